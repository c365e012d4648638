"""Adapters behind HTTP: servers with OpenAI's completions (vLLM), and llama.cpp's server with its own interface.

Every reply must name the requested model, and have a log-probability for every token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorakit.durable import JsonObject, as_object
from lorakit.errors import NonFiniteError, printable
from lorakit.verify.http_client import MOST_SHOWN, JsonClient
from lorakit.verify.prompts import Prompt
from lorakit.verify.runtime import BASE, Runtime, RuntimeRequest

MOST_NEIGHBORS = 8
"""Number of other models of a server that are compared."""


@contextlib.contextmanager
def open_url(url: str, request: RuntimeRequest) -> Iterator[Runtime]:
    """Find an adapter on a server, by its name.

    Raises:
        ModelError: The server does not answer, or does not have the adapter.
    """
    client = JsonClient(url, request.key, request.timeout)
    models = listed_models(client)
    runtime: Runtime
    if models[0].get("owned_by") == "llamacpp":
        runtime = LlamaServer(client, models, request)
    else:
        runtime = OpenAiServer(client, models, request)
    yield runtime


def listed_models(client: JsonClient) -> list[JsonObject]:
    """Return the models that a server lists; a ModelError if there are none."""
    models = [one for one in _objects(client.get("/v1/models").get("data")) if one.get("id")]
    models = [one for one in models if len(str(one["id"])) <= MOST_SHOWN]
    if not models:
        client.fail("/v1/models lists no models.")
    return models


def _objects(values: object) -> list[JsonObject]:
    """Return the objects of a list in an answer, with {} in place of other values; [] if it is not a list."""
    return [as_object(one) for one in values] if isinstance(values, list) else []


def _token_ids(values: object) -> list[int] | None:
    """Return a list of token ids in an answer; None if it is something else."""
    is_list = isinstance(values, list) and all(type(one) is int and 0 <= one < 1 << 31 for one in values)
    return values if isinstance(values, list) and is_list else None


def _shown(value: object) -> str:
    """Return a name or a version that a server gives, or "unknown"."""
    return str(value or "unknown")[:MOST_SHOWN]


SLOTS = 8
"""Number of prompts that llama.cpp answers at a time, since it generates one token of each as fast as one token."""

CERTAIN = 1e9
"""Bias of a logit with which a token is generated."""


class _Server:
    """Base of both kinds of servers: finds a name, and checks replies."""

    def __init__(self, client: JsonClient) -> None:
        self._client = client

    def _find(self, names: Sequence[str], request: RuntimeRequest) -> str:
        """Return the served name of the adapter: the given one, or the one that is named like its directory or run."""
        from lorakit.registry import name_of

        wanted = request.served_model or name_of(request.folder)
        found = [name for name in names if name == wanted] or [
            name for name in names if request.served_model is None and name.partition("@")[0] == wanted
        ]
        if len(found) != 1:
            problem = "has no" if not found else "has several"
            listed = printable(", ".join(names[:20]), one_line=True) or "none"
            self._client.fail(f"{problem} model {wanted!r} (available: {listed}); pass --served-model.", what=wanted)
        return found[0]

    def _checked(self, reply: JsonObject, model: str) -> JsonObject:
        """Return a reply if it is the named model's."""
        if reply.get("model") != model:
            self._client.fail(f"the model {model!r} was requested, but {reply.get('model')!r} answered.")
        return reply

    def _finite(self, values: Sequence[object], model: str) -> list[float]:
        """Return log-probabilities as numbers, which must all be finite."""
        numbers = [float(one) for one in values if isinstance(one, float) or (type(one) is int and abs(one) < 1 << 53)]
        if len(numbers) < len(values):
            self._client.fail(
                f"{model!r} answered without log-probabilities of the prompt; verify needs a server that gives them "
                "(vLLM, or llama.cpp's own server)."
            )
        if not all(map(math.isfinite, numbers)):
            text = f"{self._client.url}: {model!r} answered with log-probabilities that are NaN or infinite."
            raise NonFiniteError(text, what=model, where=self._client.url)
        return numbers


class OpenAiServer(_Server):
    """A server with `/v1/completions` that echoes prompts with their log-probabilities."""

    parallel = 1  # log-probabilities of two prompts at a time end vLLM 0.32 on a CPU

    def __init__(self, client: JsonClient, models: Sequence[JsonObject], request: RuntimeRequest) -> None:
        super().__init__(client)
        names = [str(model["id"]) for model in models]
        self._model = self._find(names, request)
        self.others: Sequence[str] = [name for name in names if name != self._model][:MOST_NEIGHBORS]
        self.dtype = request.dtype  # as the user says, since servers do not tell it
        number = client.get("/version", is_optional=True).get("version")
        owner = _shown(models[0].get("owned_by"))
        self.versions: Mapping[str, str] = {owner: _shown(number)}
        self.title = f"{self._model} of {owner}"

    def encode(self, prompt: Prompt) -> list[int] | None:
        """Return the token ids of a prompt from `/tokenize`, which vLLM has."""
        chat = {"messages": prompt.messages, "add_generation_prompt": True}
        body = {"model": self._model, **({"prompt": prompt.text} if prompt.chat is None else chat)}
        return _token_ids(self._client.post("/tokenize", body, is_optional=True).get("tokens"))

    def log_probabilities(self, ids: Sequence[int], other: str | None = None) -> list[float]:
        """Return the log-probability of each token but the first; one new token is generated and ignored.

        Raises:
            ModelError: The server fails, another model answers, or there are no log-probabilities.
            NonFiniteError: A log-probability is NaN or infinite.
        """
        model = other or self._model
        reply, choice = self._complete(model, ids, 1, echo=True, logprobs=1)
        counted = as_object(reply.get("usage")).get("prompt_tokens")
        if isinstance(counted, int) and counted != len(ids):
            self._client.fail(f"{model!r} read {counted} tokens instead of the {len(ids)} that were sent.")
        found = as_object(choice.get("logprobs")).get("token_logprobs")
        values = found if isinstance(found, list) else []
        return self._finite([*values[1 : len(ids)], *[None] * (len(ids) - len(values))], model)

    def greedy(self, ids: Sequence[int], count: int) -> list[int] | None:
        """Return up to `count` most likely tokens, if the server returns ids (`return_token_ids` of vLLM).

        Raises:
            ModelError: The server fails, or another model answers.
        """
        _, choice = self._complete(self._model, ids, count, return_token_ids=True)
        return _token_ids(choice.get("token_ids"))

    def _complete(self, model: str, ids: Sequence[int], count: int, **more: Any) -> tuple[JsonObject, JsonObject]:
        body = {"model": model, "prompt": [*ids], "max_tokens": count, "temperature": 0, "seed": 0, **more}
        reply = self._checked(self._client.post("/v1/completions", body), model)
        return reply, next(iter(_objects(reply.get("choices"))), {})


class LlamaServer(_Server):
    """llama.cpp's server, which serves one base and applies the adapters that each request lists.

    It gives no log-probabilities of prompts. So the tokens are generated, forced by a grammar of token ids. Grammars
    reject tokens that end texts, which are forced by a bias; neither changes the reported log-probabilities.
    """

    def __init__(
        self, client: JsonClient, models: Sequence[JsonObject], request: RuntimeRequest, adapter: str | None = None
    ) -> None:
        super().__init__(client)
        self._served = str(models[0]["id"])
        self._added = request.added_ids | request.end_ids
        self._partial: dict[int, bool] = {}
        self._vocabulary = as_object(models[0].get("meta")).get("n_vocab")
        stored = str(as_object(models[0].get("meta")).get("ftype", "unknown")).removeprefix("(guessed) ")
        self.dtype = "float32" if stored in ("F32", "all F32") else stored
        adapters = [
            (str(one.get("path")).replace("\\", "/").rpartition("/")[2].removesuffix(".gguf"), one.get("id"))
            for one in _objects(client.get("/lora-adapters").get("data"))
        ]
        names = [name for name, _ in adapters]
        self._model = adapter or self._find(names, request)
        self._lists = {
            name: [{"id": id, "scale": float(name == own)} for own, id in adapters] for name in [*names, BASE]
        }
        self.others: Sequence[str] = [BASE, *(name for name in names if name != self._model)][:MOST_NEIGHBORS]
        about = client.get("/props", is_optional=True)
        slots = about.get("total_slots")
        self.parallel = min(slots, SLOTS) if type(slots) is int and slots > 0 else 1
        self.versions: Mapping[str, str] = {"llama.cpp": _shown(about.get("build_info"))}
        self.title = f"{self._model} in llama.cpp"

    def encode(self, prompt: Prompt) -> list[int] | None:
        """Return the token ids of a prompt, rendered with the server's chat template.

        Raises:
            ModelError: The server fails.
        """
        text = prompt.text
        if prompt.chat is not None:
            text = str(self._client.post("/apply-template", {"messages": prompt.messages}).get("prompt"))
        body = {"content": text, "add_special": True, "parse_special": True}
        return _token_ids(self._client.post("/tokenize", body).get("tokens"))

    def log_probabilities(self, ids: Sequence[int], other: str | None = None) -> list[float]:
        """Return the log-probability of each token but the first.

        Raises:
            ModelError: The server fails, or there are no log-probabilities.
            NonFiniteError: A log-probability is NaN or infinite.
        """
        found: list[float] = []
        while (start := len(found) + 1) < len(ids):
            before, token = ids[:start], ids[start]
            if token in self._added:
                found += self._generated(before, [token], other, {"logit_bias": [[token, CERTAIN]]})
            elif self._is_partial(token):
                found += self._finite([self._all_of(before, other).get(token)], other or self._model)
            else:
                parts = (at for at in range(start, len(ids)) if ids[at] in self._added or self._is_partial(ids[at]))
                whole = ids[start : next(parts, len(ids))]
                grammar = "root ::= " + " ".join(f"<[{one}]>" for one in whole)
                found += self._generated(before, whole, other, {"grammar": grammar})
        return found

    def greedy(self, ids: Sequence[int], count: int) -> list[int] | None:
        """Return up to `count` most likely tokens.

        Raises:
            ModelError: The server fails.
        """
        return _token_ids(self._complete(ids, count, None).get("tokens"))

    def _is_partial(self, token: int) -> bool:
        """Return whether a token is a part of a character, which the server reports only with the rest of it."""
        if token not in self._partial:
            text = self._client.post("/detokenize", {"tokens": [token]}).get("content")
            self._partial[token] = "\ufffd" in str(text)
        return self._partial[token]

    def _all_of(self, ids: Sequence[int], other: str | None) -> Mapping[object, object]:
        """Return the log-probabilities of all tokens that may follow, while an arbitrary one is generated."""
        tokens = _token_ids(self._client.post("/tokenize", {"content": "a", "add_special": False}).get("tokens"))
        forced = tokens[-1] if tokens else None
        (entry,) = self._entries(ids, [forced], other, {"logit_bias": [[forced, CERTAIN]], "n_probs": self._vocabulary})
        top = _objects(entry.get("top_logprobs"))
        return {one["id"]: one.get("logprob") for one in top if isinstance(one.get("id"), int)}

    def _generated(
        self, ids: Sequence[int], forced: Sequence[int], other: str | None, how: Mapping[str, Any]
    ) -> list[float]:
        entries = self._entries(ids, forced, other, how)
        return self._finite([one.get("logprob") for one in entries], other or self._model)

    def _entries(
        self, ids: Sequence[int], forced: Sequence[object], other: str | None, how: Mapping[str, Any]
    ) -> list[JsonObject]:
        """Generate tokens that are forced, and return what the server says of each."""
        entries = _objects(self._complete(ids, len(forced), other, **how).get("completion_probabilities"))
        if [one.get("id") for one in entries] != [*forced]:
            self._client.fail("did not generate the tokens of its grammar; use a newer llama.cpp (tokens in grammars).")
        return entries

    def _complete(self, ids: Sequence[int], count: int, other: str | None, **more: Any) -> JsonObject:
        body = {
            "model": self._served,
            "prompt": [*ids],
            "n_predict": count,
            "temperature": 0,
            "n_probs": 1,
            "return_tokens": True,
            "cache_prompt": False,
            "lora": self._lists[other or self._model],  # without a list, it reuses what the last adapter computed
            **more,
        }
        return self._checked(self._client.post("/completion", body), self._served)
