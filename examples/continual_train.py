"""Trains a generator class after class: `funlora train`, for a clone.

accelerate launch examples/continual_train.py --config cifar10_2-2 --seed 1
"""

from funlora_hf.train import main


if __name__ == "__main__":
    main()
