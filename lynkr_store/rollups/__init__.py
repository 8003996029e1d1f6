"""Pre-aggregated rows: how they are built, kept correct, and read together with raw rows.

`buckets` splits a window into whole buckets of time and two partial edges. Each bucket holds counts
and exact integer sums (`measures`). `fold` adds the rows above the watermark (`state`) to the
buckets, with the statements of `fold_sql`. `repair` recomputes buckets whose rows were changed or
deleted. `answer` reads buckets, edges and backlog in one statement (`answer_sql`). What a statistic
is called and how it is rounded belongs in `queries`.
"""
