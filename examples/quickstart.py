"""Index this machine's own Python standard library with a pool of stateful workers.

    python3 examples/quickstart.py            nothing needs to be installed
    python3 examples/quickstart.py --chaos    the same, while a worker is killed every second

Every .py file is parsed by some worker. A worker learns once which modules there are, and keeps
that, and what it has done, in its memory. Each package has a session, whose state is the
package's running totals: they survive any worker, and count each file once. The rows go into an
SQLite index in this process. At the end the same work is done without a pool: exit code 0 means
that both answers are equal, 1 that they are not, 130 that Ctrl-C came in between.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import logging
import os
import queue
import random
import signal
import sqlite3
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Generator, Iterator, List, MutableMapping, Tuple

try:
    import minipool
except ImportError:  # a fresh clone; workers take over sys.path, so they find it too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import minipool

Rows = Dict[str, List[Tuple[Any, ...]]]  # table -> rows
Totals = Dict[str, Dict[str, int]]  # package -> what it holds -> how many
TABLES = {
    "functions": "file TEXT, line INT, length INT, name TEXT",
    "imports": "file TEXT, module TEXT",
    "unparsed": "file TEXT, why TEXT",
}
SUFFIXES = (".py", ".so", ".pyd")


# -- in the workers --------------------------------------------------------------------------------


class Indexer:
    """Turns source files into rows. One object lives in each worker, as long as the worker."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.known = known_modules(root)  # loaded once, used for every file
        self.files = self.lines = 0  # what this worker has done

    def index(self, file: str) -> Rows:
        """Return all functions and imports of one file, or why it cannot be parsed."""
        rows: Rows = {table: [] for table in TABLES}
        try:
            source = Path(self.root, file).read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of the library's authors
                tree = ast.parse(source, file)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            rows["unparsed"].append((file, type(error).__name__))
            return rows
        self.files += 1
        self.lines += source.count(b"\n")
        package = Path(file).parent.parts
        imports: set[str] = set()
        nodes: list[tuple[ast.AST, str]] = [(tree, "")]
        while nodes:
            node, prefix = nodes.pop()
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports.update(self.modules_of(node, package))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                prefix = f"{prefix}.{node.name}" if prefix else node.name
                if not isinstance(node, ast.ClassDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    rows["functions"].append((file, node.lineno, length, prefix))
            nodes.extend((child, prefix) for child in ast.iter_child_nodes(node))
        rows["imports"] += [(file, module) for module in imports]
        return rows

    def index_in_session(self, file: str) -> Rows:
        """Return the rows of one file, and add it to the totals of the session: its package's."""
        rows = self.index(file)
        add_totals(minipool.current_session(), rows)
        return rows

    def modules_of(
        self, node: ast.Import | ast.ImportFrom, package: tuple[str, ...]
    ) -> Iterator[str]:
        """Yield what an import statement imports; `from a import b` is a.b if that is a module."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        start = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{module}.{alias.name}"
            yield full if full in self.known else module

    def totals(self) -> tuple[int, int, int, int]:
        """Return who this is (worker, generation), and how many files and lines it has read."""
        me = minipool.current_worker()
        assert me is not None
        return me.worker_id, me.generation, self.files, self.lines


def add_totals(totals: MutableMapping[str, Any], rows: Rows) -> None:
    """Add one file to the totals of its package."""
    totals["files"] = totals.get("files", 0) + 1
    for table in ("functions", "imports"):
        totals[table] = totals.get(table, 0) + len(rows[table])


def package_of(file: str) -> str:
    return os.path.dirname(file).replace(os.sep, ".") or "(top level)"


def known_modules(root: str) -> frozenset[str]:
    """Return the full names of all modules below `root`, and of those built into Python."""
    names = set(sys.builtin_module_names)
    for file in files_below(root, SUFFIXES):
        parts = list(Path(file).parts)
        parts[-1] = parts[-1].partition(".")[0]
        if parts[0] == "lib-dynload":
            del parts[0]
        names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return frozenset(names)


def files_below(root: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield the files of the library itself, relative to `root`; not what was installed into it."""
    for directory, below, names in os.walk(root):
        below[:] = [d for d in below if d not in ("site-packages", "dist-packages", "__pycache__")]
        for name in names:
            if name.endswith(suffixes):
                yield os.path.relpath(os.path.join(directory, name), root)


def interleaved(files: list[str]) -> list[str]:
    """Return the files such that those of each package, whose session is serial, lie far apart."""
    packages: dict[str, list[str]] = {}
    for file in files:
        packages.setdefault(package_of(file), []).append(file)
    places = [
        ((place + 0.5) / len(members), file)
        for members in packages.values()
        for place, file in enumerate(members)
    ]
    return [file for _, file in sorted(places)]


# -- in this process -------------------------------------------------------------------------------


class Index:
    """The SQLite index. One thread fills it, whoever made the rows."""

    def __init__(self, path: str) -> None:
        self.db = sqlite3.connect(path)
        for table, columns in TABLES.items():
            self.db.execute(f"CREATE TABLE {table} ({columns})")

    def add(self, rows: Rows) -> None:
        for table, values in rows.items():
            marks = ", ".join("?" * (TABLES[table].count(",") + 1))
            self.db.executemany(f"INSERT INTO {table} VALUES ({marks})", values)

    def fingerprint(self) -> str:
        """Return a hash of every row; the order in which they came does not matter."""
        digest = hashlib.sha256()
        for table in TABLES:
            rows = [repr(row) for row in self.db.execute(f"SELECT * FROM {table}")]
            digest.update(repr((table, sorted(rows))).encode())
        return digest.hexdigest()

    def report(self) -> None:
        query = self.db.execute
        print("\nThe ten longest functions")
        for length, file, line, name in query(
            "SELECT length, file, line, name FROM functions ORDER BY length DESC, file, line "
            "LIMIT 10"
        ):
            print(f"  {length:5} lines  {name}  ({file}:{line})")
        print("\nThe ten most imported modules")
        for count, module in query(
            "SELECT count(*), module FROM imports GROUP BY module ORDER BY 1 DESC, 2 LIMIT 10"
        ):
            print(f"  {count:5} files  {module}")
        unparsed = list(query("SELECT file, why FROM unparsed ORDER BY file"))
        print(f"\nCould not be parsed: {len(unparsed)} files")
        for file, why in unparsed:
            print(f"  {file}  ({why})")

    def close(self) -> None:
        self.db.commit()
        self.db.close()


class Progress(logging.Handler):
    """A bar on standard error, if that is a terminal, and log lines that do not tear it."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total, self.done, self.shown = total, 0, ""
        self.terminal = sys.stderr.isatty()

    def step(self) -> None:
        self.done += 1
        full = 40 * self.done // self.total
        self.show(f"[{'#' * full}{'.' * (40 - full)}] {self.done} of {self.total} files")

    def show(self, bar: str) -> None:
        if self.terminal:
            with self.lock or contextlib.nullcontext():  # the handler's own, which emit() holds too
                sys.stderr.write(f"\r\x1b[K{bar}")
                sys.stderr.flush()
                self.shown = bar

    @contextlib.contextmanager
    def listening(self, level: int) -> Iterator[None]:
        """Show what minipool logs from this level on; take the bar away at the end."""
        log = logging.getLogger("minipool")
        log.setLevel(level)
        log.addHandler(self)
        try:
            yield
        finally:
            self.show("")
            log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        clear = "\r\x1b[K" if self.terminal else ""
        sys.stderr.write(f"{clear}{self.format(record)}\n{self.shown}")
        sys.stderr.flush()


class Chaos:
    """Kills a worker at once, and another one every `interval` seconds."""

    def __init__(self, pool: minipool.Pool[Any], interval: float) -> None:
        self.pool, self.interval = pool, interval
        self.killed = 0
        self.recoveries: list[float] = []  # seconds from a death to the replacement's readiness
        self._recovered: queue.SimpleQueue[float] = queue.SimpleQueue()
        pool.hooks["recovery"].append(lambda event, now, what: self._recovered.put(now["seconds"]))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def _run(self) -> None:
        while True:
            self._kill_one()
            if self._stop.wait(self.interval):
                return

    def _kill_one(self) -> None:
        serving = [w.pid for w in self.pool.workers() if w.state in ("idle", "leased") and w.pid]
        if not serving:
            return
        try:
            os.kill(random.choice(serving), getattr(signal, "SIGKILL", signal.SIGTERM))
        except ProcessLookupError:
            return  # it ended by itself
        self.killed += 1
        with contextlib.suppress(queue.Empty):
            self.recoveries.append(self._recovered.get(timeout=20))

    def __enter__(self) -> Chaos:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


def rows_from(pool: minipool.Pool[Indexer], files: list[str]) -> Generator[Rows, None, None]:
    """Yield the rows of each file, in order, asked for by as many threads as there are workers.

    Each thread talks to a worker itself. A call whose worker dies is made again on another one:
    `idempotent` says that this is safe, and it is for the totals as well, because a call that
    dies commits nothing.
    """

    def ask(file: str) -> Rows:
        caller = pool.options(idempotent=True, session=package_of(file), timeout=60.0)
        rows: Rows = caller.call("index_in_session", file)
        return rows

    threads = ThreadPoolExecutor(pool.config.size)
    try:
        yield from threads.map(ask, files)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # the pool ends what they do


def index_with_pool(
    worker: type[Indexer], root: str, files: list[str], index: Index, options: argparse.Namespace
) -> tuple[float, Totals]:
    """Fill the index from a pool and tell what the pool did; return how long it took.

    And what the sessions know in the end.
    """
    start = time.perf_counter()
    pool = minipool.Pool(
        worker,
        args=(root,),
        size=options.workers,
        start_method=options.start_method,
        checkout_timeout=30.0,
        name="stdlib",
    )
    progress = Progress(len(files))
    with pool, progress.listening(logging.INFO if options.chaos else logging.WARNING):
        print(f"Indexing {len(files)} files of {root} with {len(pool.workers())} workers")
        sys.stdout.flush()
        with Chaos(pool, options.chaos) if options.chaos else contextlib.nullcontext() as chaos:
            with contextlib.closing(rows_from(pool, files)) as found:
                for rows in found:
                    index.add(rows)
                    progress.step()
        took = time.perf_counter() - start
        stats, totals = pool.stats(), totals_of(pool)
        packages = {
            info.session_id: pool.session_state(info.session_id) for info in pool.sessions()
        }
    index.report()
    report_pool(stats, totals, chaos)
    return took, packages


def totals_of(pool: minipool.Pool[Indexer]) -> list[tuple[int, int, int, int]]:
    """Ask every worker what it has done: holding one lease each, so that none is asked twice."""
    with contextlib.ExitStack() as stack:
        leases = [stack.enter_context(pool.checkout()) for _ in range(pool.config.size or 1)]
        return sorted(lease.call(Indexer.totals) for lease in leases)


def report_pool(
    stats: minipool.PoolStats, totals: list[tuple[int, int, int, int]], chaos: Chaos | None
) -> None:
    print("\nWhat the pool did")
    print(f"  calls        {stats.calls} answered, {stats.faults} begun by a worker that died")
    p50, p99 = (1000 * (seconds or 0.0) for seconds in (stats.call_p50, stats.call_p99))
    print(f"  one call     p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    print(f"  workers      {stats.workers_started} started, {stats.workers_lost} replaced")
    if chaos is not None:
        recovery = 1000 * statistics.median(chaos.recoveries or [0.0])
        print(f"  chaos        {chaos.killed} killed; a new one was ready after {recovery:.0f} ms")
    print(f"  utilisation  {100 * stats.utilization:.0f} %")
    for worker_id, generation, files, lines in totals:
        print(f"  worker {worker_id}     generation {generation}: {files} files, {lines} lines")


def index_serially(root: str, files: list[str], index: Index) -> tuple[float, Totals]:
    """Fill the index in this process, without a pool; return how long it took, and the totals."""
    start = time.perf_counter()
    indexer = Indexer(root)
    packages: Totals = {}
    for file in files:
        rows = indexer.index(file)
        index.add(rows)
        add_totals(packages.setdefault(package_of(file), {}), rows)
    return time.perf_counter() - start, packages


def check(found: Index, packages: Totals, pool_time: float, root: str, files: list[str]) -> bool:
    """Compare index and totals with those that are made without a pool."""
    print("\nThe same without a pool", flush=True)
    expected = Index(":memory:")
    serial_time, right_packages = index_serially(root, files, expected)
    print(f"  time         {pool_time:.2f} s with the pool, {serial_time:.2f} s without")
    answer, right = found.fingerprint(), expected.fingerprint()
    expected.close()
    if packages == right_packages:
        print(f"  sessions     equal: the totals of {len(packages)} packages")
    else:
        wrong = [name for name in right_packages if packages.get(name) != right_packages[name]]
        print(f"  sessions     DIFFERENT: the totals of {', '.join(wrong[:5])}")
    if answer == right:
        print(f"  answer       equal: {answer[:16]}")
    else:
        print(f"  answer       DIFFERENT: {answer[:16]} with the pool, {right[:16]} without")
    return answer == right and packages == right_packages


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Index the standard library with a pool.")
    parser.add_argument("--workers", type=int, metavar="N", help="default: the usable CPUs")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N files")
    parser.add_argument("--start-method", choices=("forkserver", "spawn", "fork"))
    parser.add_argument("--chaos", type=float, nargs="?", const=1.0, metavar="SECONDS",
                        help="kill a worker with SIGKILL every second, or so many")  # fmt: skip
    parser.add_argument("--database", metavar="PATH", help="keep the index in this new file")
    parser.add_argument("--no-check", action="store_true", help="do not compare the answers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, worker: type[Indexer] = Indexer) -> int:
    """Run the example with other arguments, or with another kind of worker."""
    options = arguments(argv)
    if options.database and os.path.exists(options.database):
        print(f"{options.database} is there already; name a new file", file=sys.stderr)
        return 2
    root = sysconfig.get_path("stdlib")
    files = interleaved(sorted(files_below(root, (".py",))))[: options.limit]
    if not files:
        print(f"there are no .py files below {root}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="quickstart-") as directory:
            index = Index(options.database or os.path.join(directory, "index.sqlite"))
            with contextlib.closing(index):
                took, packages = index_with_pool(worker, root, files, index, options)
                equal = options.no_check or check(index, packages, took, root, files)
                return 0 if equal else 1
    except minipool.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
