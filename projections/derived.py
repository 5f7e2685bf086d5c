"""Read models that are questions to other tables: they cost nothing to keep, and can't differ from what they are made of."""

from typing import Final

VIEWS: Final[dict[str, str]] = {
    # A call is an attempt that leaves the process; so is a run that a step starts. An answer to nobody's call is no attempt.
    "attempts": """
        SELECT run_id, step, attempt, kind, coalesce(model, tool) AS name, outcome AS status, requested AS started,
               deadline AS due, ended, failure_kind, failure_message, call_id, NULL::VARCHAR AS child_run_id
        FROM calls WHERE attempt IS NOT NULL
        UNION ALL
        SELECT parent_run_id, parent_step, row_number() OVER (PARTITION BY parent_run_id, parent_step ORDER BY started, run_id),
               'run', workflow, status, started, due, ended, failure_kind, failure_message, NULL, run_id
        FROM runs WHERE parent_run_id IS NOT NULL
    """,
    "timers": """
        SELECT run_id, step,
               CASE status WHEN 'waiting' THEN 'retry' WHEN 'sleeping' THEN 'sleep' WHEN 'awaiting_approval' THEN 'approval'
                           WHEN 'awaiting_signal' THEN 'signal' WHEN 'running' THEN 'attempt' ELSE 'step' END AS kind,
               'pending' AS status, due, NULL::TIMESTAMP_MS AS fired
        FROM steps WHERE due IS NOT NULL AND ended IS NULL
        UNION ALL
        SELECT run_id, NULL, 'time_limit', 'pending', due, NULL FROM runs WHERE due IS NOT NULL AND ended IS NULL
        UNION ALL
        SELECT run_id, step, NULL, CASE WHEN ignored IS NULL THEN 'fired' ELSE 'ignored' END, NULL, decided
        FROM decisions WHERE input = 'TimerFired'
    """,
    "labels": """
        SELECT run_id, label.key AS "key", label.value AS "value"
        FROM (SELECT run_id, unnest(map_entries(labels)) AS label FROM runs)
    """,
    # One row for each call that is over: sum it by whatever is wanted.
    "usage": """
        SELECT ended::DATE AS "day", workflow, run_id, step, call_id, kind, model, tool, provider, outcome, input_tokens,
               cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_usd, prices
        FROM calls WHERE ended IS NOT NULL
    """,
}
"""SQL views by name."""
