"""The models of the actor's tests."""

from tests.actor.conftest import model, tied_model

__all__ = ["model", "tied_model"]
