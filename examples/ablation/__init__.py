"""The paper's tables at the size of the data at hand: which runs they take, running them, writing them down."""
