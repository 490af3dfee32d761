"""The host side of beam search: options checked, the compiled search run, hypotheses read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np

from paxattn import loops
from paxattn.beam import NEVER, Beams, EarlyStopping
from paxattn.decode_step import Status
from paxattn.requests import GenerateOptions, Prompt, Requests, integer, positive, prepare_requests
from paxattn.results import Completion, Generation, new_text, no_stats

_LARGEST_POWER = 37  # of ten that a float32 holds


def generate_beams(
    model: Any,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    *,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | str,
    num_return_sequences: int,
) -> Generation:
    """See `generate.generate`.

    Returns:
        ``num_return_sequences`` completions per prompt, with scores. What a prompt that ran out of
        pages lacks in hypotheses comes from its unfinished beams, best first; where there are no
        more of those either, a completion is empty and its score -inf.
    """
    for name in ("sampling", "num_samples", "draft", "stop"):
        if options.get(name) is not None:
            raise ValueError(f"{name}= does not go with num_beams=: leave one of them out")
    num_beams = positive("num_beams", num_beams)
    if not 1 <= integer("num_return_sequences", num_return_sequences) <= num_beams:
        raise ValueError(f"{num_return_sequences=} must be between 1 and {num_beams=}")
    if not isinstance(early_stopping, bool | np.bool_) and early_stopping != "never":
        raise ValueError(f'{early_stopping=} must be False, True or "never"')
    if not isinstance(length_penalty, Real) or not abs(length_penalty) <= 100:
        raise ValueError(f"{length_penalty=} must be a number between -100 and 100")
    grouped: GenerateOptions = {**options, "num_samples": num_beams}
    requests = prepare_requests(model, prompts, **grouped)
    longest = max(1, int(np.max(requests.max_new_tokens, initial=1)))
    if abs(length_penalty) * math.log10(longest) > _LARGEST_POWER:
        raise ValueError(
            f"{length_penalty=} is too far from 0 for {longest} new tokens: the "
            "power of the one to the other is no float32"
        )
    stats = no_stats(requests)
    if not requests.prompts:
        return Generation(completions=[], stats=stats)
    pool = requests.take_pool()
    try:
        pool, status, hypotheses, running, use = loops.search(
            model,
            pool,
            requests.packed,
            requests.prompt_lens,
            requests.max_new_tokens,
            requests.stop_ids,
            np.float32(length_penalty),
            np.int32(EarlyStopping[str(early_stopping).upper()]),
            sizes=requests.sizes,
            logits_processor=requests.logits_processor,
            scrub=requests.scrub,
        )
        jax.block_until_ready(status)  # raises what failed: see `generate`
        bytes_per_page = pool.cache.bytes_per_page
    finally:
        if requests.kept is not None:
            requests.kept.put_back(pool, scrub=requests.scrub)
    stats = stats.after(
        use, bytes_per_page=bytes_per_page, max_positions=model.config.max_positions
    )
    status, hypotheses, running = jax.device_get((status, hypotheses, running))
    completions = []
    for i in range(len(requests.prompts)):
        found = _completions(requests, i, hypotheses)
        if status[i] == Status.OUT_OF_PAGES or not found:
            found += _completions(requests, i, running, unfinished=Status(status[i]))
        empty = Completion(
            prompt_tokens=requests.prompts[i],
            tokens=[],
            logprobs=[],
            text="",
            finish_reason=Status(status[i]).name.lower(),
            score=-math.inf,
        )
        completions += (found + [empty] * num_return_sequences)[:num_return_sequences]
    return Generation(completions=completions, stats=stats)


def _completions(
    requests: Requests, index: int, beams: Beams, unfinished: Status | None = None
) -> list[Completion]:
    """The beams of one prompt, best first; ``unfinished`` says why running ones got no further."""
    stop_ids = set(requests.stop_ids[index * requests.sizes.group].tolist())
    prompt = requests.prompts[index]
    out = []
    for k in range(requests.sizes.group):
        length, score = int(beams.lens[index, k]), float(beams.scores[index, k])
        if score <= NEVER:
            continue
        tokens = beams.tokens[index, k, :length].tolist()
        text = new_text(requests, prompt)
        ended = Status.STOP if tokens and tokens[-1] in stop_ids else Status.LENGTH
        out.append(
            Completion(
                prompt_tokens=prompt,
                tokens=tokens,
                logprobs=beams.logprobs[index, k, :length].tolist(),
                text="" if text is None else text.push(tokens, final=True)[0],
                finish_reason=(unfinished or ended).name.lower(),
                score=score,
            )
        )
    return out
