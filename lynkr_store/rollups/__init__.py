"""Pre-aggregated rows: how they are made, kept right, and read together with raw rows.

A window is whole buckets of time and two partial edges (`buckets`); each bucket holds counts and
exact integer sums (`measures`). `fold` adds the rows above the watermark (`state`) to the buckets
by the statements of `fold_sql`; `repair` recomputes buckets whose rows were changed or deleted; and
`answer` reads buckets, edges and backlog in one statement (`answer_sql`). What a statistic is
called and how it is rounded stays in `queries`.
"""
