"""The kernels in configs that only a tuning table chooses, in Pallas' interpreter.

By the checks of the kernels' own tests: numbers, races, poisoned memory.
"""

import dataclasses

import attention_cases as cases
import pytest
import test_mosaic_gpu_decode as decode
import test_mosaic_gpu_prefill as prefill
from attention_cases import Case
from test_mosaic_gpu_decode import _clean  # noqa: F401  (a fixture)

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("page_size", [16, 128])
def test_decode_in_blocks_of_128(page_size, monkeypatch):
    real = decode.support.run_with

    def run_with(*arrays, config, **options):
        config = dataclasses.replace(config, block_kv=128, stages=3)
        return real(*arrays, config=config, **options)

    monkeypatch.setattr(decode.support, "run_with", run_with)
    case = Case(
        q_lens=(1, 1, 1), kv_lens=(300, 37, 128), **decode.BF16, heads=(4, 1), window=200,
        page_size=page_size, max_q_len=1,
    )  # fmt: skip
    inputs = cases.make(case)
    decode.check(inputs, decode.run(cases.poison(inputs)))


def test_prefill_in_blocks_of_64_three_stages_and_a_thread_block_per_item(monkeypatch):
    chosen = prefill.Config(block_kv=64, stages=3, num_ctas=6)
    monkeypatch.setattr(prefill.prefill_config, "default_config", lambda **_: chosen)
    case = Case(q_lens=(70, 1), kv_lens=(263, 20), **prefill.BF16, heads=(2, 1), window=180)
    inputs = cases.make(case)
    prefill.check(inputs, prefill.run(cases.poison(inputs)))
