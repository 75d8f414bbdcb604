"""The arithmetic of what runs before anybody asks: prepare, extraction, training, scoring, and what they store.

Names are those of `PlanArgs`, of ``benchmarks/unit_costs.toml``, of `capacity.given`, and of rules further up.
"""

from __future__ import annotations

from llm4msr.planning.ledger import Rule

PREPARE = (
    Rule("prepare_core_h", "core h", "interactions / prepare_rows_per_s_per_core / s_per_h", "work of jobs.prepare"),
    Rule("prepare_cores", "core", "ceil(prepare_core_h / deadline_hours)", "cores that keep the deadline"),
    Rule("prepare_h", "h", "prepare_core_h / prepare_cores", "hours"),
    Rule("prepare_usd", "USD", "prepare_core_h * core_usd_per_h", "price"),
)

PROMPTS = (
    Rule("user_prompts", "prompts", "users * users_asked", "prompts about users"),
    Rule("item_prompts", "prompts", "items * items_asked", "prompts about items"),
    Rule("prompts", "prompts", "user_prompts + item_prompts + scenarios", "all prompts"),
    Rule(
        "prompt_tokens",
        "tokens",
        "(user_prompts + scenarios) * tokens_per_prompt + item_prompts * tokens_per_item_prompt",
        "tokens to read",
    ),
)

# Of a language model on GPUs: the roofline of reading a prompt, which is bound by arithmetic and not by memory.
EXTRACT_ON_GPUS = (
    Rule("pipeline_share", "1", "pipeline_rate / engines_rate", "what the pipeline leaves of its engines' speed"),
    Rule(
        "gpu_flops",
        "FLOP / s / gpu",
        "gpu_peak_flops * matmul_share_of_peak * prefill_share_of_matmul * pipeline_share",
        "useful arithmetic of a GPU",
    ),
    Rule("prompt_flop", "FLOP", "flop_per_weight * matmul_params * prompt_tokens", "two operations a weight and token"),
    Rule("prompts_per_s_per_gpu", "prompts / s / gpu", "gpu_flops * prompts / prompt_flop", "prompts of one GPU"),
    Rule("extract_gpu_h", "gpu h", "prompt_flop / gpu_flops / s_per_h", "work of jobs.extract"),
    Rule("gpus_wanted", "gpu", "ceil(extract_gpu_h / deadline_hours / pool_share)", "GPUs that keep the deadline"),
    Rule("extract_h", "h", "extract_gpu_h / extract_gpus / pool_share", "hours with the GPUs of this plan"),
    Rule("extract_usd", "USD", "extract_gpus * extract_h * gpu_usd_per_h", "price"),
    Rule("refresh_gpu_h", "gpu h", "extract_gpu_h * users_changed_per_day", "work of a day's refresh"),
    Rule("refresh_gpus", "gpu", "max(ceil(refresh_gpu_h / refresh_hours / pool_share), one_gpu)", "GPUs for it"),
    Rule("refresh_h", "h", "refresh_gpu_h / refresh_gpus / pool_share", "its hours"),
    Rule("refresh_usd", "USD", "refresh_gpus * refresh_h * gpu_usd_per_h", "its price, a day"),
    Rule("weights_gb", "GB", "all_params * bytes_of_half / bytes_per_gb", "the model in a GPU's memory"),
    Rule(
        "units_per_s",
        "units / s",
        "prompts_per_s_per_gpu * extract_gpus / rows_per_commit",
        "units that the driver hands out",
    ),
)

# Of the embedded encoder, which was measured on processors.
EXTRACT_ON_CORES = (
    Rule(
        "tokens_per_s_per_core",
        "tokens / s / core",
        "embedded_prompts_per_s * embedded_tokens_per_prompt / embedded_cores",
        "tokens of one core",
    ),
    Rule("extract_core_h", "core h", "prompt_tokens / tokens_per_s_per_core / s_per_h", "work of jobs.extract"),
    Rule("extract_cores", "core", "ceil(extract_core_h / deadline_hours / pool_share)", "cores that keep the deadline"),
    Rule("extract_h", "h", "extract_core_h / extract_cores / pool_share", "hours"),
    Rule("extract_usd", "USD", "extract_cores * extract_h * core_usd_per_h", "price"),
    Rule("refresh_core_h", "core h", "extract_core_h * users_changed_per_day", "work of a day's refresh"),
    Rule("refresh_cores", "core", "max(ceil(refresh_core_h / refresh_hours / pool_share), one_core)", "cores for it"),
    Rule("refresh_h", "h", "refresh_core_h / refresh_cores / pool_share", "its hours"),
    Rule("refresh_usd", "USD", "refresh_cores * refresh_h * core_usd_per_h", "its price, a day"),
    Rule(
        "units_per_s",
        "units / s",
        "prompts / (extract_h * s_per_h) / rows_per_commit",
        "units that the driver hands out",
    ),
)

RESUME = (
    Rule("parts", "parts", "ceil(prompts / rows_per_commit)", "files of the store"),
    Rule("resume_h", "h", "parts * resume_ms_per_part / ms_per_s / s_per_h", "finding on s3:// what is done already"),
    Rule("driver_gb", "GB", "users * driver_bytes_per_user / bytes_per_gb", "memory of the extraction's driver"),
)

TABLES = (
    Rule("vectors", "vectors", "users + items * items_asked + scenarios", "vectors that training looks up"),
    Rule("table_gb", "GB", "vectors * width * bytes_of_half / bytes_per_gb", "the knowledge table"),
    Rule(
        "embedding_gb",
        "GB",
        "(users + items) * embedding_dim * bytes_of_float / bytes_per_gb",
        "embeddings of users and items",
    ),
    Rule("optimized_gb", "GB", "embedding_gb * optimizer_factor", "embeddings with their optimizer's state"),
    Rule("entities_gb", "GB", "(users + items) * entity_bytes / bytes_per_gb", "ids and features of users and items"),
)

TRAIN_ON_CORES = (
    Rule("worker_rows_per_s", "rows / s / worker", "train_rows_per_s_on_cpu", "of one worker"),
    Rule("worker_usd_per_h", "USD / worker / h", "train_cores * core_usd_per_h", "price of a worker"),
    Rule("workers_on_node", "worker", "max(floor(node_cores / train_cores), one_worker)", "workers that a node holds"),
)
TRAIN_ON_GPUS = (
    Rule(
        "worker_rows_per_s",
        "rows / s / worker",
        "min(train_rows_per_s_on_gpu, feed_rows_per_s)",
        "of one worker: what its GPU takes, or what the thread that reads and collates brings",
    ),
    Rule("worker_usd_per_h", "USD / worker / h", "gpus_of_worker * gpu_usd_per_h", "price of a worker"),
    Rule("workers_on_node", "worker", "gpus_of_node / gpus_of_worker", "workers that a node holds"),
)
TRAIN = (
    Rule("train_rows", "rows", "interactions * train_share", "rows of train"),
    Rule("row_passes", "rows", "train_rows * epochs * runs", "rows over all epochs and runs"),
    Rule("train_worker_h", "worker h", "row_passes / worker_rows_per_s / s_per_h", "work of jobs.train"),
    Rule("workers_wanted", "worker", "ceil(train_worker_h / deadline_hours / train_scaling)", "workers that keep it"),
    Rule("train_h", "h", "train_worker_h / train_workers / train_scaling", "hours with the workers of this plan"),
    Rule("train_usd", "USD", "train_workers * train_h * worker_usd_per_h", "price"),
    Rule(
        "group_rows_per_s",
        "rows / s",
        "worker_rows_per_s * train_workers * train_scaling",
        "rows of the whole group",
    ),
    Rule(
        "touched_per_row",
        "table rows / row",
        "(distinct_users_in_batch + distinct_items_in_batch) / measured_batch",
        "table rows that a batch touches, by row",
    ),
    Rule(
        "exchange_gb_per_s",
        "GB / s",
        "group_rows_per_s * touched_per_row * (embedding_dim * bytes_of_float + bytes_of_index) / bytes_per_gb",
        "gradients of table rows that each worker receives from all",
    ),
)

SCORE = (
    Rule("scored", "candidates", "users * scenarios * score_candidates", "candidates that jobs.score ranks"),
    Rule("score_core_h", "core h", "scored * candidate_ms / ms_per_s / s_per_h", "work of jobs.score"),
    Rule("score_cores", "core", "max(ceil(score_core_h / deadline_hours), one_core)", "cores that keep the deadline"),
    Rule("score_h", "h", "score_core_h / score_cores", "hours"),
    Rule("score_usd", "USD", "score_core_h * core_usd_per_h", "price"),
)

STORE = (
    Rule("raw_gb", "GB", "interactions * raw_bytes_per_row / bytes_per_gb", "raw logs"),
    Rule("staging_gb", "GB", "interactions * staged_bytes_per_row / bytes_per_gb", "staging of prepare, for its hours"),
    Rule("prepared_gb", "GB", "interactions * prepared_bytes_per_row / bytes_per_gb", "prepared rows"),
    Rule("prompts_gb", "GB", "prompts * prompt_bytes / bytes_per_gb", "prompts"),
    Rule(
        "key_bytes",
        "B",
        "store_gib_of_keys * bytes_per_gib / store_keys - store_width * bytes_of_half",
        "of a stored vector beside its numbers",
    ),
    Rule(
        "store_gb",
        "GB",
        "prompts * (width * bytes_of_half + key_bytes) / bytes_per_gb",
        "vectors in the store",
    ),
    Rule("checkpoint_gb", "GB", "embedding_gb + entities_gb + table_gb", "a finished checkpoint"),
    Rule("states_gb", "GB", "num_to_keep * optimized_gb", "checkpoints of a training under way"),
    Rule("scores_gb", "GB", "users * scenarios * top_k * bytes_of_score / bytes_per_gb", "scores"),
    Rule(
        "kept_gb",
        "GB",
        "raw_gb + prepared_gb + prompts_gb + store_gb + table_gb + runs * checkpoint_gb + scores_gb",
        "what stays",
    ),
    Rule("storage_usd", "USD / month", "kept_gb * storage_usd_per_gb_month", "price, a month"),
)
