"""The figures of each study, drawn again from its records; loaded only when they are asked for."""
