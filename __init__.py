"""cinemesh trains the Movie Gen Video transformer: a step is one program, read four ways."""
