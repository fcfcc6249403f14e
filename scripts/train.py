"""Train with any method: accelerate launch scripts/train.py --config configs/swepo/demo.yaml [--any_field value]"""

import sys

from trainers.cli.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
