"""What a caller asks of `generate`: checked, tokenized, and rounded up to compiled shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypedDict

import jax
import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from paxattn.kept_pool import KeptPool
from paxattn.packing import bucket, pack_prompts
from paxattn.page_table.inputs import INT32_MAX
from paxattn.page_table.state import check_pool
from paxattn.pool import Pool
from paxattn.quantized import page_dtype_name
from paxattn.sampling import LogitsProcessor, RowSampling, SamplingParams, row_sampling
from paxattn.speculative import Drafter, DraftModel, NGram
from paxattn.step import PackedPrompts, check_model
from paxattn.tree import MOST_NODES

Prompt = str | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """Options of `generate` and `stream`.

    Numbers may be NumPy's or JAX's too, and arrays stand for lists; in prompts as well.

    Attributes:
        tokenizer: encodes text prompts and decodes completions; without it only ids go in and out.
        max_new_tokens: for all prompts, or one for each; 128 by default.
        sampling: `SamplingParams` for all prompts, or one for each; greedy by default.
        num_samples: completions of each prompt, which share its pages until they diverge; sample j
            has the prompt's ``seed + j`` and is what a request with that seed would get.
        draft: who guesses tokens for speculative decoding: `NGram` or `DraftModel`.
        prefix_cache: True, the default: what several prompts begin with is computed once and its
            pages are shared, page by page; False: every prompt for itself; a `KeptPool`: prompts
            also start from what earlier calls with it left there.
        salt: for all prompts, or one for each; 0 by default. Only prompts of the same salt share
            anything: one for each tenant, or whatever else must match. Any int32.
        stop_token_ids: tokens that end a completion, such as the checkpoint's eos ids.
        stop: strings that end a completion and are left out of its text; needs a tokenizer.
        page_size: tokens per page, 1 to 256; 16 by default, or the `KeptPool`'s.
        num_pages: pages in the pool; by default enough for every prompt to run to its end, or the
            `KeptPool`'s.
        kv_dtype: of the pages: "float32", "bfloat16", "float16", "float8_e4m3fn" ("fp8") or "int8",
            see `quantized`; by default a model's own, or the `KeptPool`'s.
        prefill_chunk: prompt tokens per prefill step; 512 by default.
        logits_processor: traceable ``(logits f32[R, V], num_generated i32[R]) -> logits``; a
            different function object compiles anew.
        scrub: zero the pages that finished requests give back before others can take them, for
            tenants who must not trust masks alone; off by default.
    """

    tokenizer: Tokenizer | None
    max_new_tokens: int | Sequence[int]
    sampling: SamplingParams | Sequence[SamplingParams]
    num_samples: int
    draft: Drafter | None
    prefix_cache: bool | KeptPool
    salt: int | Sequence[int]
    stop_token_ids: Sequence[int]
    stop: Sequence[str] | None
    page_size: int | None
    num_pages: int | None
    kv_dtype: DTypeLike | None
    prefill_chunk: int
    logits_processor: LogitsProcessor | None
    scrub: bool


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Static sizes of a generation: what is compiled for.

    ``group`` is rows per prompt, ``kv_dtype`` that of the pages, None: the model's own.
    """

    group: int
    page_size: int
    num_pages: int
    max_pages_per_seq: int
    capacity: int
    chunk: int
    kv_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Checked requests, padded to buckets: R rows, ``sizes.group`` neighbouring ones per prompt.

    Attributes:
        prompts: the token ids of each prompt.
        packed: all prompts' tokens, padded, and where they are.
        prompt_lens: i32[R], 0 in padding rows.
        salts: i32[R].
        max_new_tokens: i32[R].
        stop_ids: i32[R, S], padded with -1.
        sampling: parameters per row.
        sizes: what is compiled for.
        enough_pages: with so many in the pool, no request can run out of pages.
        tokenizer: as given.
        stop: as given.
        draft: as given.
        kept: the `KeptPool`, if one was given.
        logits_processor: as given.
        scrub: as given.
    """

    prompts: list[list[int]]
    packed: PackedPrompts
    prompt_lens: np.ndarray
    salts: np.ndarray
    max_new_tokens: np.ndarray
    stop_ids: np.ndarray
    sampling: RowSampling
    sizes: Sizes
    enough_pages: int
    tokenizer: Tokenizer | None
    stop: Sequence[str]
    draft: Drafter | None
    kept: KeptPool | None
    logits_processor: LogitsProcessor | None
    scrub: bool

    def take_pool(self) -> Pool | None:
        """The pool to run in, if one was given: `KeptPool.put_back` it."""
        if self.kept is None:
            return None
        return self.kept.take(max_pages_per_seq=self.sizes.max_pages_per_seq, salts=self.salts)


def plain(value: Any) -> Any:
    """NumPy's and JAX's numbers and arrays as Python's; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else value


def tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer | None, vocab: int) -> list[list[int]]:
    """Token ids of each prompt, checked."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of prompts, not one string: [{prompts[:40]!r}]")
    listed = plain(prompts)
    if not isinstance(listed, Iterable) or isinstance(listed, Set | Mapping):
        raise TypeError(f"{prompts=} must be a list of prompts")
    return [prompt_ids(f"prompts[{i}]", one, tokenizer, vocab) for i, one in enumerate(listed)]


def prompt_ids(name: str, prompt: Prompt, tokenizer: Tokenizer | None, vocab: int) -> list[int]:
    """Token ids of the prompt of this name, checked."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is text: pass tokenizer=, or token ids instead")
        ids = tokenizer.encode(_whole_text(name, prompt)).ids
    else:
        if isinstance(prompt, Set | Mapping):
            raise TypeError(f"{name} is {prompt!r}: must be a sequence of token ids, in order")
        ids = _integers(name, prompt)
    if not ids:
        raise ValueError(f"{name} has no tokens: a model needs at least one to start from")
    wrong = [token for token in ids if not 0 <= token < vocab]
    if wrong:
        raise ValueError(f"{name} has token id {wrong[0]}: not in the model's 0..{vocab - 1}")
    return ids


def integer(name: str, value: Any) -> int:
    """A whole number, of Python's, NumPy's or JAX's; never a rounded one."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name} is {value!r}: must be an integer")
    return int(number)


def positive(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name}={number} must be at least 1")
    return number


def _integers(name: str, values: Any) -> list[int]:
    numbers = plain(values)
    if isinstance(numbers, str | bytes) or not isinstance(numbers, Iterable):
        raise TypeError(f"{name} is {values!r}: must be a sequence of token ids")
    return [integer(f"a token of {name}", number) for number in numbers]


def _whole_text(name: str, text: str) -> str:
    """The text, unless it has half characters: bytes that were no UTF-8 when Python read them."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{name} is {text!r}: no valid text; decode its bytes as what they are")
    return text


def per_prompt(name: str, value: Any, kind: type, kind_name: str, count: int) -> list[Any]:
    """One value for all prompts, or a sequence with one for each."""
    value = plain(value)
    if isinstance(value, kind):
        return [value] * count
    values = [plain(one) for one in value] if isinstance(value, Sequence) else [None]
    if not all(isinstance(one, kind) for one in values):
        raise TypeError(f"{name}={value!r} must be {kind_name}, or one for each prompt")
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts")
    return values


def stop_strings(stop: Any, tokenizer: Tokenizer | None) -> Sequence[str]:
    """The strings that end a completion, checked."""
    if stop is None:
        return ()
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise TypeError(f"{stop=} must be a list of strings")
    for one in stop:
        if not isinstance(one, str):
            raise TypeError(f"{stop=} has {one!r}: must be a list of strings")
        if not one:
            raise ValueError(f"{stop=} must be a list of non-empty strings")
        _whole_text("a stop string", one)
    if stop and tokenizer is None:
        raise ValueError(f"{stop=} needs tokenizer= to turn tokens into text")
    return stop


def stop_tokens(values: Any, vocab: int) -> list[int]:
    """The token ids that end a completion, checked."""
    ids = _integers("stop_token_ids", values)
    unknown = [token for token in ids if not 0 <= token < vocab]
    if unknown:
        raise ValueError(f"stop_token_ids has {unknown[0]}: not in the model's 0..{vocab - 1}")
    return ids


def check_salt(salt: Any, whose: str) -> int:
    """An int32."""
    if not -(2**31) <= integer(f"salt of {whose}", salt) < 2**31:
        raise ValueError(f"{salt=} of {whose} must be an int32: from -2**31 to 2**31 - 1")
    return int(salt)


def prepare_requests(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
    num_samples: int = 1,
    draft: Drafter | None = None,
    prefix_cache: bool | KeptPool = True,
    salt: int | Sequence[int] = 0,
    stop_token_ids: Sequence[int] = (),
    stop: Sequence[str] | None = None,
    page_size: int | None = None,
    num_pages: int | None = None,
    kv_dtype: DTypeLike | None = None,
    prefill_chunk: int = 512,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
    **unknown: Any,
) -> Requests:
    """Check the requests and round their shapes up to buckets."""
    if unknown:
        raise TypeError(
            f"{next(iter(unknown))}= is no option: {', '.join(GenerateOptions.__annotations__)} "
            "are (temperature, top_p, seed and such are fields of sampling=SamplingParams(...))"
        )
    check_model("model", model)
    config = model.config
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}: must be a tokenizers.Tokenizer, such as a "
            "checkpoint's tokenizer (of one of transformers: its backend_tokenizer)"
        )
    stop = stop_strings(stop, tokenizer)
    ids = tokenize(prompts, tokenizer, config.vocab_size)
    new = per_prompt("max_new_tokens", max_new_tokens, Integral, "an integer", len(ids))
    params = per_prompt("sampling", sampling, SamplingParams, "a SamplingParams", len(ids))
    salts = per_prompt("salt", salt, Integral, "an integer", len(ids))
    salts = [check_salt(one, f"prompts[{i}]") for i, one in enumerate(salts)]
    for i, (prompt, n) in enumerate(zip(ids, new, strict=True)):
        if integer(f"max_new_tokens of prompts[{i}]", n) < 0:
            raise ValueError(f"max_new_tokens={n} of prompts[{i}] must be at least 0")
        if len(prompt) + n > config.max_positions:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens and max_new_tokens={n}: more than the "
                f"model's {config.max_positions} positions; shorten the one or lower the other"
            )
    prefill_chunk = positive("prefill_chunk", prefill_chunk)
    num_samples = positive("num_samples", num_samples)
    if logits_processor is not None and not callable(logits_processor):
        raise TypeError(f"{logits_processor=} must be a function of logits and num_generated")
    if not isinstance(scrub, bool | np.bool_):
        raise TypeError(f"{scrub=} must be True or False")
    _check_draft(draft, config.vocab_size)
    kept = prefix_cache if isinstance(prefix_cache, KeptPool) else None
    if kept is None and not isinstance(prefix_cache, bool):
        raise TypeError(f"{prefix_cache=} must be True, False or a KeptPool")
    page_size, num_pages = _pool_sizes(model, kept, page_size, num_pages)
    kv_dtype = _pool_dtype(kept, kv_dtype)
    stop_token_ids = stop_tokens(stop_token_ids, config.vocab_size)
    num_prompts = bucket(len(ids))
    num_rows = num_prompts * num_samples
    if num_rows * config.vocab_size > INT32_MAX:  # counts and logits, before arrays are made
        raise ValueError(
            f"{len(ids)} prompts with {num_samples} samples (or beams) each take {num_rows} rows, "
            f"which with {config.vocab_size} logits each are more than an int32 counts: ask for "
            f"{INT32_MAX // config.vocab_size} rows at most"
        )
    total = bucket(sum(map(len, ids)), 16)
    capacity = bucket(max(new, default=0), 16)
    longest = bucket(max(map(len, ids), default=0), 16) + capacity
    # A tree lies in the pages for a moment, beyond what will be kept of it.
    beside = 0 if draft is None else draft.num_tokens * (draft.branches - 1)
    longest += beside
    enough = total // page_size + num_prompts + num_rows * ((capacity + beside) // page_size + 2)
    sizes = Sizes(
        group=num_samples,
        page_size=page_size,
        num_pages=enough if num_pages is None else num_pages,
        max_pages_per_seq=-(-longest // page_size),
        capacity=capacity,
        chunk=min(total, prefill_chunk),
        kv_dtype=kv_dtype,
    )
    stop_ids = np.full((num_rows, bucket(len(stop_token_ids), 8)), -1, np.int32)
    stop_ids[:, : len(stop_token_ids)] = stop_token_ids
    # Prompts that will not run have no pages to share.
    owners = [s if prefix_cache and n > 0 else None for s, n in zip(salts, new, strict=True)]

    def rows(per_prompt: Sequence[int]) -> np.ndarray:
        column = np.repeat(np.array(per_prompt, np.int32), num_samples)
        return np.pad(column, (0, num_rows - len(column)))

    seeded = [
        replace(one, seed=(int(one.seed) + j) % 2**32) if j else one
        for one in params
        for j in range(num_samples)
    ]
    return Requests(
        prompts=ids,
        packed=pack_prompts(
            ids, owners, page_size=page_size, group=num_samples, num_rows=num_rows, total=total
        ),
        prompt_lens=rows([len(prompt) for prompt in ids]),
        salts=rows(salts),
        max_new_tokens=rows(new),
        stop_ids=stop_ids,
        sampling=row_sampling(seeded, num_rows),
        sizes=sizes,
        enough_pages=enough,
        tokenizer=tokenizer,
        stop=stop,
        draft=draft,
        kept=kept,
        logits_processor=logits_processor,
        scrub=bool(scrub),
    )


def _pool_sizes(
    model: Any, kept: KeptPool | None, page_size: int | None, num_pages: int | None
) -> tuple[int, int | None]:
    """Tokens per page, and pages if that is said."""
    size = 16 if page_size is None else integer("page_size", page_size)
    pages = None if num_pages is None else integer("num_pages", num_pages)
    check_pool(1 if pages is None else pages, size)
    if kept is None:
        return size, pages
    for name, value in (("page_size", page_size), ("num_pages", num_pages)):
        if value is not None and value != getattr(kept, name):
            raise ValueError(
                f"{name}={value}, but the KeptPool has {getattr(kept, name)}: leave {name}= out"
            )
    if kept.model is not model:
        raise ValueError("the KeptPool was made for another model: its pages mean nothing here")
    return kept.page_size, kept.num_pages


def _pool_dtype(kept: KeptPool | None, kv_dtype: DTypeLike | None) -> str | None:
    """The name of the pages' dtype; None: the model's own."""
    name = page_dtype_name(kv_dtype)
    if kept is None:
        return name
    if name is not None and name != kept.kv_dtype:
        raise ValueError(
            f"kv_dtype={name}, but the KeptPool has {kept.kv_dtype}: leave kv_dtype= out"
        )
    return kept.kv_dtype


def _check_draft(draft: Any, vocab_size: int) -> None:
    if draft is None:
        return
    if not isinstance(draft, NGram | DraftModel):
        what = f"a {type(draft).__name__}" if callable(draft) else repr(draft)
        raise TypeError(f"draft is {what}: must be an NGram or a DraftModel(model=...)")
    numbers = {"num_tokens": draft.num_tokens, "branches": draft.branches}
    if isinstance(draft, NGram):
        numbers["longest"] = draft.longest
    else:
        check_model("draft.model", draft.model)
        if draft.model.config.vocab_size != vocab_size:
            raise ValueError(
                f"the draft model has {draft.model.config.vocab_size} tokens, the model "
                f"{vocab_size}: both need the same vocabulary"
            )
    for name, value in numbers.items():
        if positive(f"draft.{name}", value) > MOST_NODES:
            raise ValueError(f"draft.{name}={value} must be at most {MOST_NODES}")
    if 1 + draft.num_tokens * draft.branches > MOST_NODES:
        raise ValueError(
            f"draft.num_tokens={draft.num_tokens} with draft.branches={draft.branches} must be at "
            f"most {MOST_NODES - 1} guesses together: lower one of them"
        )
    if draft.branches > vocab_size:
        raise ValueError(f"draft.branches={draft.branches} must be at most {vocab_size=}")
