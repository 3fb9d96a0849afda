"""Runs kernels in PTX, NVIDIA's assembly language, on a CPU: all threads in step, each register an array over them.

Of the language it knows what the SDK's kernel is written in; anything else is a KeyError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

BITS = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "b64": np.uint64}


class Memory(Protocol):
    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Bytes [n, size] at n addresses."""

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write bytes [n, size] to n addresses."""


class Kernel:
    """The only kernel of a module."""

    def __init__(self, text: str) -> None:
        found = re.search(r"\.entry (\w+)\(([^)]*)\)\s*\{(.*)\}", text, re.DOTALL)
        assert found is not None
        self.name, self.labels = found[1], {}
        self.parameters = re.findall(r"\.param \.(\w+) (\w+)", found[2])
        self.code: list[tuple[str | None, list[str], list[str]]] = []
        for line in re.sub(r"//.*", "", found[3]).splitlines():
            if label := re.fullmatch(r"\s*(\w+):\s*", line):
                self.labels[label[1]] = len(self.code)
            elif (order := line.strip().rstrip(";")) and not order.startswith(".reg"):
                condition, rest = re.fullmatch(r"(?:@(%\w+) )?(.*)", order).groups()  # type: ignore[union-attr]
                operator, _, operands = rest.partition(" ")
                self.code.append((condition, operator.split("."), re.findall(r"[%\w.]+", operands)))

    def run(self, grid: tuple[int, int], threads: int, arguments: Sequence[int], memory: Memory) -> None:
        x, y, lane = (numbers.ravel() for numbers in np.indices((*grid, threads), np.uint32))
        run = _Run({"%ctaid.x": x, "%ctaid.y": y, "%tid.x": lane, "%ntid.x": np.full_like(x, threads)}, memory)
        for (kind, name), value in zip(self.parameters, arguments, strict=True):
            run.registers[name] = np.full(len(x), value, BITS[kind])
        place = np.zeros(len(x), np.int64)
        while (place < len(self.code)).any():
            now = place.min()
            lanes = np.flatnonzero(place == now)
            condition, operator, operands = self.code[now]
            place[lanes] += 1
            if operator[0] == "ret":
                place[lanes] = len(self.code)
            elif operator[0] == "bra":
                taken = lanes if condition is None else lanes[run.registers[condition][lanes] != 0]
                place[taken] = self.labels[operands[0]]
            else:
                assert condition is None
                run.step(operator, operands, lanes)


class _Run:
    def __init__(self, registers: Mapping[str, np.ndarray], memory: Memory) -> None:
        self.registers, self.memory = dict(registers), memory

    def of(self, operand: str, lanes: np.ndarray, kind: str) -> np.ndarray:
        found = np.full(len(lanes), int(operand)) if operand.isdigit() else self.registers[operand][lanes]
        return found.astype(BITS[kind])

    def set(self, name: str, lanes: np.ndarray, values: np.ndarray) -> None:
        """Registers hold bits: whoever reads one says what they mean."""
        count = len(self.registers["%tid.x"])
        kept = self.registers.setdefault(name, np.zeros(count, values.dtype))
        assert kept.dtype.itemsize == values.dtype.itemsize, f"{name} has another width"
        kept[lanes] = values.view(kept.dtype)

    def step(self, operator: list[str], operands: list[str], lanes: np.ndarray) -> None:
        name, kind = operator[0], operator[-1]

        def of(index: int, kind: str = kind) -> np.ndarray:
            return self.of(operands[index], lanes, kind)

        if name in ("mov", "cvt", "add", "shl", "setp") or operator[1] == "param":
            values = {
                "mov": lambda: of(1),
                "ld": lambda: of(1),
                "cvt": lambda: of(1, kind).astype(BITS[operator[1]]),
                "add": lambda: of(1) + of(2),
                "shl": lambda: of(1) << of(2),
                "setp": lambda: {"lt": np.less, "ge": np.greater_equal}[operator[1]](of(1), of(2)),
            }[name]()
            self.set(operands[0], lanes, values)
        elif name == "mul":
            wide = {"wide": np.uint64, "lo": BITS[kind]}[operator[1]]
            self.set(operands[0], lanes, of(1).astype(wide) * of(2).astype(wide))
        elif name == "ld":
            words = self.memory.read(of(-1, "u64"), 4 * (len(operands) - 1)).view(np.uint32)
            for index, register in enumerate(operands[:-1]):
                self.set(register, lanes, np.ascontiguousarray(words[:, index]))
        else:
            assert name == "st"
            words = np.stack([of(index) for index in range(1, len(operands))], axis=1)
            self.memory.write(of(0, "u64"), words.view(np.uint8))
