"""Train with any method: accelerate launch scripts/train.py --config configs/swepo/demo.yaml [--any_field value]"""

import sys

from polypo import mistakes_told
from trainers.cli.train import main

if __name__ == "__main__":
    with mistakes_told():
        main(sys.argv[1:])
