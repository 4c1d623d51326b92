import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two spinning threads on a busy machine are slower than one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

torch.set_num_threads(1)
