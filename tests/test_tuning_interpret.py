"""The kernels in configs that only a tuning table chooses, in Pallas' interpreter.

By the checks of the kernels' own tests: numbers, races, poisoned memory.
"""

import attention_cases as cases
import gpu_interpreter
import pytest
from attention_cases import Case
from gpu_interpreter import interpreted

from paxattn.attention.mosaic_gpu.prefill_config import Config

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def _clean():
    yield
    gpu_interpreter.reset()


@interpreted
@pytest.mark.parametrize("page_size", [16, 128])
def test_decode_in_blocks_of_128(page_size):
    case = Case(
        q_lens=(1, 1, 1), kv_lens=(300, 37, 128), heads=(4, 1), head_dim=64, dtype="bfloat16",
        window=200, page_size=page_size, max_q_len=1,
    )  # fmt: skip
    inputs = cases.make(case)
    got = gpu_interpreter.run(cases.poison(inputs), block_kv=128, stages=3)
    gpu_interpreter.check(inputs, got)


@interpreted
def test_prefill_in_blocks_of_64_three_stages_and_a_thread_block_per_item():
    case = Case(
        q_lens=(70, 1), kv_lens=(263, 20), heads=(2, 1), head_dim=64, dtype="bfloat16",
        window=180, page_size=16,
    )  # fmt: skip
    inputs = cases.make(case)
    chosen = Config(block_kv=64, stages=3, num_ctas=6)
    got = gpu_interpreter.run(cases.poison(inputs), prefill=chosen, short=0)
    gpu_interpreter.check(inputs, got)
