"""Random generators for what must stay secret: the noise and the sample, from the system's entropy.

``Generator.manual_seed`` takes 64 bits, but torch's CPU generator (a Mersenne Twister) uses only the lower 32: noise
from such a seed is one of 2^32 streams, which anybody who holds the update can try. So the whole state is drawn anew.
"""

import secrets
from typing import Any

from fedmentor_core.errors import FedMentorError

_STATE_BYTES, _WORDS_AT, _N_WORDS = 5056, 24, 624  # torch's serialised CPU generator: 624 words of 32 bits in 64


def secret_generator(device: str = "cpu") -> Any:
    """A generator that nobody else can reproduce."""
    import torch

    generator = torch.Generator(device=device)
    reseed_from_entropy(generator)
    return generator


def reseed_from_entropy(generator: Any) -> None:
    """Replace the generator's whole state: 19,968 bits on a CPU, the 64-bit key on a GPU.

    Raises:
        FedMentorError: this torch keeps its CPU state in another form.
    """
    import numpy as np
    import torch

    generator.manual_seed(secrets.randbits(63))
    if generator.device.type != "cpu":
        return
    state = generator.get_state()
    if state.numel() != _STATE_BYTES:
        raise FedMentorError(
            f"this torch keeps its random state in {state.numel()} bytes, expected {_STATE_BYTES}: secret noise cannot "
            "be made. Install the torch version of the constraints file."
        )
    words = np.frombuffer(secrets.token_bytes(4 * _N_WORDS), dtype="<u4").astype("<u8")
    state[_WORDS_AT : _WORDS_AT + 8 * _N_WORDS] = torch.from_numpy(np.frombuffer(words.tobytes(), np.uint8).copy())
    generator.set_state(state)
    if not torch.equal(generator.get_state(), state):
        raise FedMentorError("torch did not accept a random state from the system's entropy. Nothing was trained.")
