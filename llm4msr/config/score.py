"""The section about scoring in batches: what jobs.score is asked, and where its answers go."""

from __future__ import annotations

from pydantic import model_validator

from llm4msr.config.base import Auto, Fraction, PositiveInt, Section


class ScoreConfig(Section):
    """What jobs.score scores: the rows of a table, or the best items of every user in every scenario."""

    input_uri: str | None = None
    """Parquet file or folder, local or s3://, of lists (columns user, scenario, items; if wanted top_k and a struct
    context) or of pairs (user, scenario, item; if wanted context). Unset: every user is scored in every scenario."""
    users_uri: str | None = None
    """Without input_uri: Parquet file or folder with a column user; unset: the users of the checkpoint."""
    candidates_uri: str | None = None
    """Without input_uri: the items that are ranked, a JSON list or Parquet with a column item; unset: all items of the
    checkpoint."""
    scenarios: tuple[str, ...] = ()
    """Without input_uri: scenarios that are scored; empty: all."""
    top_k: PositiveInt = 100
    """Without input_uri: items that are kept of each user in each scenario."""
    checkpoint_uri: str | None = None
    """The checkpoint that scores; unset: the one that report.json of workspace_uri names."""
    output_uri: str | None = None
    """Folder that the scores go to, local or s3://, and nothing else; unset: scores/ of workspace_uri, named by what
    is scored."""
    max_failed_fraction: Fraction = 0.01
    """Share of the rows (or users) that may be impossible to score before the job fails."""
    rows_per_commit: PositiveInt | Auto = "auto"
    """Rows (or users) of one file of scores, which a crash can cost each actor; auto: some ten seconds' work."""
    num_actors: PositiveInt | Auto = "auto"
    """Processes that score; auto: as many as the processors hold."""
    cpus_per_actor: PositiveInt = 1
    """Processors of a process that scores, and its torch threads."""

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        if self.input_uri is not None:
            for key in ("users_uri", "candidates_uri", "scenarios"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key} = {getattr(self, key)!r} and input_uri = {self.input_uri!r}: the input says itself "
                        "who and what is scored; give one of the two"
                    )
        if len(set(self.scenarios)) != len(self.scenarios):
            raise ValueError(f"scenarios = {list(self.scenarios)}: give each once")
        return self
