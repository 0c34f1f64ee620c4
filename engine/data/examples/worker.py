"""A worker process of `parallel`: batches of rows come on its standard input, what became of them goes out.

The first message is what the `Encoding` is made of. When the input ends, so does the process. Both sides are our own
processes, joined by pipes that nobody else can write to: that is what makes pickle safe here.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback

from engine.data.examples import parallel
from engine.data.examples.encoding import Encoding
from engine.errors import UserError


def main() -> None:
    """Serves until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    requests = sys.stdin.buffer
    made_of = parallel.receive(requests)
    if made_of is None:
        return
    cfg, tokenizer_folder, pairs = pickle.loads(made_of)
    encoding = Encoding(cfg, tokenizer_folder, pairs=pairs)
    while (request := parallel.receive(requests)) is not None:
        batch, format = pickle.loads(request)
        try:
            answer = "done", parallel.encode_batch(encoding, batch, format)
        except UserError as error:
            answer = "user_error", str(error)
        except Exception:
            answer = "bug", traceback.format_exc()
        parallel.send(answers, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


if __name__ == "__main__":
    main()
