"""What `GET /v1/model` tells of what is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.schemas import CanaryReply, FeatureReply, ModelReply, RankBody, RefusedReply, ScenarioReply
from serve.served import Served

if TYPE_CHECKING:
    from serve.api import Limits

# Metadata of a checkpoint that is shown elsewhere, or that is too long to show.
NOT_TRAINING = frozenset({"model_version", "backbone", "knowledge", "history"})


def describe(served: Served, limits: Limits) -> ModelReply:
    """Returns the description of the model that answers now."""
    ranker, choice, refused, canary = served.ranker, served.choice, served.refused, served.canary
    checkpoint, example = ranker.checkpoint, served.example
    schema, metadata = checkpoint.schema, checkpoint.metadata
    reads_users = checkpoint.model.reads_users
    return ModelReply(
        model_version=ranker.model_version,
        backbone=metadata["backbone"],
        knowledge=metadata["knowledge"],
        scenarios=[ScenarioReply(name=s.name, description=s.description) for s in schema.scenarios],
        features=[
            FeatureReply(name=f.name, kind=f.kind, source=f.source, max_length=f.max_length) for f in schema.features
        ],
        user_key_type=schema.user_key_type,
        item_key_type=schema.item_key_type,
        num_users=checkpoint.users.num_rows,
        num_items=checkpoint.items.num_rows,
        checkpoint_uri=choice.checkpoint_uri,
        max_candidates=limits.max_candidates,
        max_batch=limits.max_batch,
        candidate_sets={name: len(items) for name, items in limits.candidate_sets.items()},
        knowledge_dim=checkpoint.knowledge.width if reads_users else None,
        reads_history=bool(schema.history_columns) or ranker.makes_vectors,
        refused=refused and RefusedReply(checkpoint_uri=refused.checkpoint_uri, reason=refused.reason),
        canary=canary
        and CanaryReply(
            checkpoint_uri=choice.canary.checkpoint_uri,
            model_version=canary.model_version,
            share=choice.canary.share,
            mode=choice.canary.mode,
        ),
        training={name: value for name, value in metadata.items() if name not in NOT_TRAINING},
        example=RankBody(user=example.user, scenario=example.scenario, items=list(example.items)),
    )
