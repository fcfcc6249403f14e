"""The parts of EM-DPO: E-step, first guess, rounds on disk, scoring, the game, serving and distilling its mixture."""
