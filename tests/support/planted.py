"""Another role's operators and functions, in a schema in which it may create.

PostgreSQL takes an operator or function whose arguments are exactly those that a statement has, in
whatever schema of the path, before one of its own that would have to convert them.
"""

from collections.abc import Sequence

import psycopg
from psycopg import sql

_LIKE_THE_LEFT = ("+", "-", "*", "/", "%", "^", "&", "|", "#", "<<", ">>", "||")
"""Operators that return what stands on their left; all others say yes or no."""
_COMPARING = ("=", "<>", "<", "<=", ">", ">=", "~", "!~", "~~", "!~~", "~~*", "@>", "<@", "&&")
_BEFORE_ONE = ("+", "-", "~")

FEW_TYPES = (
    "text",
    "varchar",
    "bpchar",
    "name",
    '"char"',
    "smallint",
    "integer",
    "bigint",
    "numeric",
    "real",
    "float8",
    "boolean",
    "oid",
    "regclass",
    "regtype",
    "text[]",
    "bigint[]",
)
"""Of the columns that the store and the catalogue have, and of what is compared with them."""

TYPES = (
    *FEW_TYPES,
    "regnamespace",
    "jsonb",
    "uuid",
    "timestamptz",
    "xid",
    "varchar[]",
    "integer[]",
    "oid[]",
    "name[]",
    '"char"[]',
    "int2vector",
    "oidvector",
    "pg_node_tree",
    "anyelement",
    "anyarray",
    "anycompatible",
    "anycompatiblearray",
)

FUNCTIONS = {  # name to the most arguments it is made with
    "abs": 1,
    "array_agg": 1,
    "avg": 1,
    "ceil": 1,
    "char_length": 1,
    "count": 1,
    "current_database": 1,
    "current_schema": 1,
    "current_setting": 2,
    "current_schemas": 1,
    "floor": 1,
    "format_type": 2,
    "generate_series": 2,
    "generate_subscripts": 2,
    "has_schema_privilege": 2,
    "has_table_privilege": 2,
    "json_agg": 1,
    "json_build_object": 2,
    "length": 1,
    "lower": 1,
    "max": 1,
    "min": 1,
    "mod": 2,
    "nextval": 1,
    "obj_description": 2,
    "pg_advisory_lock": 2,
    "pg_advisory_unlock": 2,
    "pg_advisory_xact_lock": 2,
    "pg_backend_pid": 1,
    "pg_database_size": 1,
    "pg_get_constraintdef": 2,
    "pg_get_expr": 2,
    "pg_get_indexdef": 2,
    "pg_get_serial_sequence": 2,
    "pg_get_userbyid": 1,
    "pg_has_role": 2,
    "pg_is_in_recovery": 1,
    "pg_relation_size": 1,
    "pg_table_is_visible": 1,
    "pg_table_size": 1,
    "pg_total_relation_size": 1,
    "pg_try_advisory_lock": 2,
    "pg_try_advisory_xact_lock": 2,
    "quote_ident": 1,
    "round": 2,
    "row_number": 1,
    "set_config": 3,
    "setval": 2,
    "sign": 1,
    "string_agg": 2,
    "sum": 1,
    "to_regclass": 1,
    "to_regnamespace": 1,
    "to_regtype": 1,
    "trunc": 1,
    "unnest": 1,
    "version": 1,
}

_PLANT_OPERATORS = """
DO $do$
DECLARE
    l text; r text; op text; kind text; polymorphic boolean; number int := 0; planted int := 0;
BEGIN
    FOREACH l IN ARRAY {types} LOOP
        FOREACH r IN ARRAY {types} LOOP
            number := number + 1;
            FOREACH kind IN ARRAY ARRAY['like_', 'bool_'] LOOP
                EXECUTE format(
                    'CREATE FUNCTION %I.%I(%s, %s) RETURNS %s LANGUAGE plpgsql '
                    'AS $$BEGIN RAISE EXCEPTION ''planted''; END$$',
                    {schema}, 'planted_' || kind || number, l, r,
                    CASE kind WHEN 'like_' THEN l ELSE 'boolean' END
                );
            END LOOP;
            FOREACH op IN ARRAY {operators} LOOP
                CONTINUE WHEN EXISTS (
                    SELECT FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace
                    AND oprname = op AND oprleft = l::regtype AND oprright = r::regtype
                );
                EXECUTE format(
                    'CREATE OPERATOR %I.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = %I.%I)',
                    {schema}, op, l, r, {schema}, 'planted_'
                    || CASE WHEN op = ANY ({like_the_left}) THEN 'like_' ELSE 'bool_' END || number
                );
                planted := planted + 1;
            END LOOP;
        END LOOP;
        EXECUTE format(
            'CREATE FUNCTION %I.%I(%s) RETURNS %s LANGUAGE plpgsql '
            'AS $$BEGIN RAISE EXCEPTION ''planted''; END$$',
            {schema}, 'planted_before_' || number, l, l
        );
        FOREACH op IN ARRAY {before_one} LOOP
            CONTINUE WHEN EXISTS (
                SELECT FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace
                AND oprname = op AND oprleft = 0 AND oprright = l::regtype
            );
            EXECUTE format(
                'CREATE OPERATOR %I.%s (RIGHTARG = %s, FUNCTION = %I.%I)',
                {schema}, op, l, {schema}, 'planted_before_' || number
            );
            planted := planted + 1;
        END LOOP;
    END LOOP;
    PERFORM set_config('planted.operators', planted::text, false);
END $do$
"""

_PLANT_FUNCTION = """
DO $do$
DECLARE
    l text; r text; planted int := current_setting('planted.functions')::int;
BEGIN
    FOREACH l IN ARRAY {types} LOOP
        FOREACH r IN ARRAY CASE {arguments} WHEN 1 THEN ARRAY[''] ELSE {types} || ARRAY[''] END
        LOOP
            BEGIN
                EXECUTE format(
                    'CREATE FUNCTION %I.%I(%s) RETURNS %s LANGUAGE plpgsql '
                    'AS $$BEGIN RAISE EXCEPTION ''planted''; END$$',
                    {schema}, {name}, l || CASE WHEN r = '' THEN '' ELSE ', ' || r END
                    || CASE {arguments} WHEN 3 THEN ', boolean' ELSE '' END, {returns}
                );
                planted := planted + 1;
            EXCEPTION WHEN invalid_function_definition THEN NULL;
            END;
        END LOOP;
    END LOOP;
    PERFORM set_config('planted.functions', planted::text, false);
END $do$
"""


def plant(url: str, schema: str, role: str, types: Sequence[str]) -> tuple[int, int]:
    """Make them all as the role, in the schema.

    Nobody else may execute one: a statement that would fails when it begins, rows or no rows.

    Returns:
        How many operators and functions.
    """
    lists = {
        "types": types,
        "operators": (*_LIKE_THE_LEFT, *_COMPARING),
        "like_the_left": _LIKE_THE_LEFT,
    }
    lists["before_one"] = _BEFORE_ONE
    given = {
        name: sql.Literal(list(values)) + sql.SQL("::text[]") for name, values in lists.items()
    }
    given["schema"] = sql.Literal(schema)
    with psycopg.connect(url) as connection:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        connection.execute("SET search_path = pg_catalog")  # lest it runs what it plants
        connection.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
        connection.execute("SELECT set_config('planted.functions', '0', false)")
        connection.execute(sql.SQL(_PLANT_OPERATORS).format(**given))
        plain = [name for name in types if not name.startswith("any")]
        given["types"] = sql.Literal(plain) + sql.SQL("::text[]")
        for name, arguments in FUNCTIONS.items():
            returns = "numeric" if name in ("sum", "avg") else "bigint"
            named = {"name": name, "arguments": arguments, "returns": returns}
            some = {key: sql.Literal(value) for key, value in named.items()}
            connection.execute(sql.SQL(_PLANT_FUNCTION).format(**(given | some)))
        counts = connection.execute(
            "SELECT current_setting('planted.operators'), current_setting('planted.functions')"
        ).fetchone()
    assert counts
    return int(counts[0]), int(counts[1])
