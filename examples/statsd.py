"""StatsD: a pool's figures by UDP, in the form with tags that DogStatsD, Telegraf and others read.

    listener = StatsD(pool, "127.0.0.1", 8125)   # until listener.close()

Names and meanings are those that OpenTelemetry gives to connection pools. The only tags are the
pool's name and a state: a tag for each process or session would fill any server.
As a program it shows what is sent: it listens to itself while a small pool works.
"""

import contextlib
import socket
import weakref

from minipool import Pool, telemetry

STATES = ("idle", "leased", "starting", "probing", "stopping", "lost")
TIMES = {  # event: the measurement, and what it is called
    "worker.init": ("seconds", "create_time"),
    "worker.checkout": ("wait", "wait_time"),
    "worker.checkin": ("seconds", "use_time"),
}


class StatsD:
    """Sends times as they happen, and counts whenever the pool's manager looks round."""

    def __init__(self, pool, host="127.0.0.1", port=8125, prefix="minipool.worker."):
        self.prefix = prefix
        self.tag = "pool:" + "".join(
            c if c.isalnum() or c in "-_." else "_" for c in pool.config.name
        )
        self.pool = weakref.ref(pool)  # or the pool's own list would keep it alive
        self.timeouts = 0
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        self.socket = socket.socket(family, kind, proto)
        self.socket.setblocking(False)  # nobody waits for a server: what cannot go now is dropped
        self.socket.connect(address)
        self.detach = telemetry.attach_reporter(
            pool, self.hear, [*TIMES, "utilization", "pool.terminate"]
        )

    def hear(self, event, measurements, metadata):
        if event in TIMES:
            measurement, name = TIMES[event]
            self.send(f"{name}:{measurements[measurement] * 1000:.3f}|ms")
            return
        pool = self.pool()
        if pool is not None:
            stats, config = pool.stats(), pool.config
            new, self.timeouts = stats.checkout_timeouts - self.timeouts, stats.checkout_timeouts
            self.send(
                *(f"count:{getattr(stats, state)}|g|#state:{state}" for state in STATES),
                f"max:{config.max_size + config.max_overflow}|g",
                f"idle.min:{config.min_size}|g",
                f"pending_requests:{stats.waiting}|g",
                f"timeouts:{new}|c",
            )

    def send(self, *figures):
        lines = [
            self.prefix + figure + ("," if "|#" in figure else "|#") + self.tag
            for figure in figures
        ]
        with contextlib.suppress(OSError):  # no server, no room, or closed: figures are no cargo
            self.socket.send("\n".join(lines).encode())

    def close(self):
        self.detach()
        self.socket.close()


def main():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        pool = Pool(size=2, name="demo")
        listener = StatsD(pool, *server.getsockname())
        with pool:
            for number in range(3):
                pool.call(abs, -number)
        listener.close()
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                print(server.recv(65536).decode())


if __name__ == "__main__":
    main()
