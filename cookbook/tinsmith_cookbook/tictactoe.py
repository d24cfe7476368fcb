"""Tic-tac-toe: the board as text, its rules, and two opponents that never learn."""

import random
from dataclasses import dataclass
from functools import cache

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
EMPTY = " " * 9


@dataclass(frozen=True)
class Board:
    """cells[i] is X, O or a space; X begins."""

    cells: str = EMPTY

    @property
    def turn(self) -> str:
        return "X" if self.cells.count("X") == self.cells.count("O") else "O"

    @property
    def free(self) -> list[int]:
        return [at for at, cell in enumerate(self.cells) if cell == " "]

    @property
    def winner(self) -> str:
        """X or O, or nobody: ""."""
        return next(
            (self.cells[a] for a, b, c in LINES if self.cells[a] == self.cells[b] == self.cells[c] != " "), ""
        )

    @property
    def is_over(self) -> bool:
        return bool(self.winner) or not self.free

    def play(self, at: int) -> "Board":
        if at not in self.free:
            raise ValueError(f"cell {at} is taken")
        return Board(self.cells[:at] + self.turn + self.cells[at + 1 :])

    def __str__(self) -> str:
        """Free cells by their number from 1, as players name them."""
        shown = [str(at + 1) if cell == " " else cell for at, cell in enumerate(self.cells)]
        return "\n".join(" ".join(shown[row : row + 3]) for row in (0, 3, 6))

    def question(self) -> str:
        return f"Tic-tac-toe. You are {self.turn}.\n{self}\nYour move?"


def read_move(text: str, board: Board) -> int | None:
    """The cell an answer names, if it is one digit and free."""
    text = text.strip()
    at = int(text) - 1 if text.isascii() and text.isdigit() and len(text) == 1 else -1
    return at if at in board.free else None


def random_move(board: Board, draw: random.Random) -> int:
    return draw.choice(board.free)


def best_move(board: Board, draw: random.Random) -> int:
    """One of the moves of perfect play."""
    values = {at: -_value(board.play(at).cells) for at in board.free}
    return draw.choice([at for at, value in values.items() if value == max(values.values())])


@cache
def _value(cells: str) -> int:
    """For whose turn it is, under perfect play: 1 wins, 0 draws, -1 loses."""
    board = Board(cells)
    if board.is_over:
        return -1 if board.winner else 0
    return max(-_value(board.play(at).cells) for at in board.free)
