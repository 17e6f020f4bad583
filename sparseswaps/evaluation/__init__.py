"""How good a model is: perplexity, embeddings, the field's zero-shot tasks."""

from .beginning import AddBos, Beginning
from .evaluate import Evaluation, evaluate
from .measures import is_causal, mean_cosine, perplexity, pooled_embeddings
from .quality import model_embeddings, model_perplexity

__all__ = [
    "AddBos",
    "Beginning",
    "Evaluation",
    "evaluate",
    "is_causal",
    "mean_cosine",
    "model_embeddings",
    "model_perplexity",
    "perplexity",
    "pooled_embeddings",
]
