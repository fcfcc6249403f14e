"""The parts of SGPO: prompts, filters, reviser, improver training, stages on disk, what is watched."""
