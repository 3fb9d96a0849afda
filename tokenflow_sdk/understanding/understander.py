"""`Understander`: questions about images, answered token by token over a shared pool of key/value pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from time import perf_counter

from tokenflow_sdk.arguments import items
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.language_model import LanguageModel
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.understanding.answering import Answer, Answering
from tokenflow_sdk.understanding.chat import Chat
from tokenflow_sdk.understanding.chat_text import ChatText
from tokenflow_sdk.understanding.image_features import ImageFeatures, ImageInput
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.scheduler import TokenScheduler
from tokenflow_sdk.understanding.token_loop import AnswerRequest, TokenLoop

__all__ = ["Understander"]


class Understander(LanguageModel[UnderstanderConfig, AnswerRequest]):
    """Answers questions about images, as TokenFlow models in the LLaVA layout do (docs/model.md, section 5).

    Make one with `from_pretrained`. Questions may come from several threads; answers that run at once share steps.
    """

    config_type = UnderstanderConfig

    def answer(
        self,
        images: ImageInput | Sequence[ImageInput],
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
            images: what it is about, one or a list: a path, bytes, file object, PIL image or u8 array; `Codes`, for which
                no encoder runs; or features, float [N, C].
            question: in words. Control tokens in it are text.
            max_tokens, temperature, seed: as in `AnswerParams`, and before those of `params`. A random seed if none is given.
            params: these and all other settings.

        Raises:
            ArgumentError: no image, or a setting that cannot work.
            ImageError, ArrayError, CodesError: an image cannot be used, or comes from another tokenizer.
            PromptError: no question, or more tokens than the model reads.
            PagesExhausted: it would not fit into the pool even alone.
            BackendError, MissingPackageError: the backend cannot run.
        """
        return self._answering.answers(
            [self._request(images, question, AnswerParams.of(max_tokens, temperature, seed, params))]
        )[0]

    def stream(
        self,
        images: ImageInput | Sequence[ImageInput],
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> Iterator[str]:
        """The answer in pieces of whole characters, as they are found. Closing the iterator cancels it and frees its pages.

        Arguments and errors as in `answer`; what is wrong with them is raised at once.
        """
        request = self._request(images, question, AnswerParams.of(max_tokens, temperature, seed, params))
        return self._answering.pieces(request)

    def answer_batch(
        self,
        questions: Iterable[tuple[ImageInput | Sequence[ImageInput], str]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> list[Answer]:
        """Answer several questions together, each a pair of images and question. Arguments and errors as in `answer`.

        Raises:
            ArgumentError: something else than pairs, e.g. one question.
        """
        hint = "Write answer_batch([(images, question), ...]), or answer(images, question) for one question."
        pairs = list(items("questions", questions, hint))
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise ArgumentError("answer_batch takes pairs of images and question.", hint)
        chosen = AnswerParams.of(max_tokens, temperature, seed, params)
        return self._answering.answers([self._request(images, question, chosen) for images, question in pairs])

    def chat(self, images: ImageInput | Sequence[ImageInput]) -> Chat:
        """A conversation about some images. Errors about them as in `answer`."""
        return Chat(self._answering, images)

    @cached_property
    def _answering(self) -> Answering:
        text = ChatText(self._text_tokenizer, self.config.template)
        return Answering(ImageFeatures(self.tokenizer, self.config), text, self._runner, self.config.context)

    def _request(self, images: ImageInput | Sequence[ImageInput], question: str, params: AnswerParams) -> AnswerRequest:
        began = perf_counter()
        return self._answering.first(self._answering.images(images), question, params, False, began)

    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> TokenScheduler:
        return TokenScheduler(TokenLoop(self.config, sessions, transformer))
