"""Self-play: one model plays both sides of tic-tac-toe against itself, and learns from who won.

Games start in groups from the same position, some moves into the game, where less lies between a move and
its outcome. Every move earns what its side got in the end, 1 for a win, -1 for a loss, 0 for a draw, the
less the more moves followed; a move that is not allowed loses at once. Its advantage is how much better its
side fared than that side did in the other games of the group. Progress is measured in whole games against
opponents that never learn: one moves at random, one plays perfectly, against whom a draw is all there is.
"""

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmith_cookbook import options, rollouts, tracking
from tinsmith_cookbook.advantages import centred
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.rollouts import Rollout
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect
from tinsmith_cookbook.tictactoe import Board, best_move, random_move, read_move

STEPS = options.Steps(full=15, short=10)
POSITIONS, GROUP, DISCOUNT, GAMES_JUDGED = 12, 8, 0.7, 150
RANK, LEARNING_RATE, MAX_TOKENS = 16, 5e-4, 3
OPPONENTS = {"random": random_move, "perfect": best_move}


@dataclass
class Game:
    """moves: (side, what was read and written) of every move that the model made."""

    board: Board
    moves: list[tuple[str, Rollout]] = field(default_factory=list)
    forfeited_by: str = ""

    def reward(self, side: str) -> float:
        if self.forfeited_by:
            return -1.0 if side == self.forfeited_by else 0.0
        return 0.0 if not self.board.winner else 1.0 if side == self.board.winner else -1.0


async def play(
    sampler: Any,
    renderer: Renderer,
    board: Board,
    seed: int,
    *,
    opponent: Callable[[Board, random.Random], int] | None = None,
    side: str = "",
    temperature: float = 1.0,
) -> Game:
    """A game to its end: against itself, or as `side` against an opponent."""
    game, draw = Game(board), random.Random(seed)
    while not game.board.is_over:
        turn = game.board.turn
        if opponent and turn != side:
            game.board = game.board.play(opponent(game.board, draw))
            continue
        params = tinker.SamplingParams(
            max_tokens=MAX_TOKENS, stop=renderer.stop, seed=draw.randrange(2**31), temperature=temperature
        )
        prompt = renderer.prompt([{"role": "user", "content": game.board.question()}])
        [rollout] = await rollouts.group(sampler, prompt, 1, params)
        game.moves.append((turn, rollout))
        move = read_move(renderer.parse(rollout.written).message["content"], game.board)
        if move is None:
            game.forfeited_by = turn
            break
        game.board = game.board.play(move)
    return game


def position(draw: random.Random) -> Board:
    """After two to six moves at random that did not end the game."""
    board = Board()
    for _ in range(draw.randrange(2, 7)):
        board = board.play(random_move(board, draw))
    return position(draw) if board.is_over else board


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    training = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed)
    renderer, draw = Renderer.of(training), random.Random(settings.seed)

    async def group(sampler: Any, board: Board, seeds: Sequence[int]) -> list[Game]:
        return await rollouts.gather(play(sampler, renderer, board, seed) for seed in seeds)

    sampler = await training.save_weights_and_get_sampling_client()
    before = await standing(sampler, renderer)
    tracker.log(0, shares(before))
    for step in range(settings.steps):
        groups = await rollouts.gather(
            group(sampler, position(draw), [draw.randrange(2**31) for _ in range(GROUP)])
            for _ in range(POSITIONS)
        )
        used: list[Rollout] = []
        data: list[tinker.Datum] = []
        for games in groups:
            for side in "XO":
                gains = centred([game.reward(side) for game in games])
                for game, gain in zip(games, gains, strict=True):
                    moves = [rollout for turn, rollout in game.moves if turn == side and gain != 0]
                    used += reversed(moves)
                    data += [r.datum(gain * DISCOUNT**left) for left, r in enumerate(reversed(moves))]
        games = [game for some in groups for game in some]
        numbers = {
            "forfeits": sum(bool(g.forfeited_by) for g in games) / len(games),
            "draws": sum(not g.forfeited_by and not g.board.winner for g in games) / len(games),
            "x_wins": sum(g.board.winner == "X" for g in games) / len(games),
        }
        if data:  # else every group ended all alike
            forward_backward = training.forward_backward(data, "importance_sampling")
            optim_step = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
            passed = await forward_backward
            await optim_step
            numbers |= rollouts.kl(used, passed)
        sampler = await training.save_weights_and_get_sampling_client()
        is_last = step + 1 == settings.steps
        if is_last or step % 5 == 4:
            after = await standing(sampler, renderer, OPPONENTS if is_last else ("random",))
            numbers |= shares(after)
        tracker.log(step + 1, numbers)
        print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()), flush=True)

    table = [
        {"when": when, "opponent": who, **row}
        for when, found in (("before", before), ("after", after))
        for who, row in found.items()
    ]
    names = (("random", "won"), ("perfect", "lost"))
    return {"gain_against_random": after["random"]["won"] - before["random"]["won"]} | {
        f"{what}_against_{who}_{when}": found[who][what]
        for who, what in names
        for when, found in (("before", before), ("after", after))
    }, table


def shares(found: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{who}_{what}": row[what] for who, row in found.items() for what in ("won", "lost")}


async def standing(
    sampler: Any, renderer: Renderer, opponents: Iterable[str] = OPPONENTS
) -> dict[str, dict[str, float]]:
    """Shares of games won, drawn, lost (of these, by a forbidden move), at temperature 0.5, half of them as
    X."""
    found = {}
    for name in opponents:
        games = await rollouts.gather(
            play(sampler, renderer, Board(), i, opponent=OPPONENTS[name], side="XO"[i % 2], temperature=0.5)
            for i in range(GAMES_JUDGED)
        )
        ends = Counter(
            {1.0: "won", 0.0: "drawn", -1.0: "lost"}[game.reward("XO"[i % 2])] for i, game in enumerate(games)
        )
        forfeits = sum(bool(game.forfeited_by) for game in games)
        found[name] = {end: ends[end] / len(games) for end in ("won", "drawn", "lost")}
        found[name]["forfeited"] = forfeits / len(games)
    return found


def parser() -> argparse.ArgumentParser:
    return options.parser("self_play", __doc__, STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result, table = asyncio.run(train(client, settings, tracker))
    lines = {name: tracker.line(name) for name in ("random_won", "random_lost", "perfect_lost", "forfeits")}
    tracking.draw(
        settings.out / "curve.png", f"Tic-tac-toe by self-play, {settings.base}", lines, xlabel="step"
    )
    tracking.write_result(settings.out, result, table)


if __name__ == "__main__":
    main()
