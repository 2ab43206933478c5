"""What teachers have answered, on disk: an image that was asked about is not asked about again."""

from coordinator.answers.keys import Question, image_keys
from coordinator.answers.remembered import RememberedAnswers
from coordinator.answers.store import AnswerStore

__all__ = ["AnswerStore", "Question", "RememberedAnswers", "image_keys"]
