"""OpenTelemetry: a pool's figures as metrics. Needs `pip install opentelemetry-sdk`.

    detach = instrument(pool, other_pool)   # into the meter provider that is set, or meter=...

Names and meanings are those of OpenTelemetry's conventions for connection pools. The only
attributes are the pool's name and a state: one for each process or session would have no end.
As a program it prints what a reader collects from a small pool.
"""

import sys
import weakref

from minipool import Pool, telemetry

try:
    from opentelemetry import metrics
except ImportError:
    sys.exit("OpenTelemetry is not installed; try: pip install opentelemetry-sdk")

STATES = ("idle", "leased", "starting", "probing", "stopping", "lost")
TIMES = {  # event: the measurement, what it is called, and what it is
    "worker.init": ("seconds", "create_time", "Time until a new worker was ready"),
    "worker.checkout": ("wait", "wait_time", "Time a caller waited for a worker"),
    "worker.checkin": ("seconds", "use_time", "Time a worker was leased"),
}


def instrument(*pools, meter=None):
    """Report these pools, now and whenever a reader asks; return what ends it."""
    meter = meter or metrics.get_meter("minipool")
    watched = [weakref.ref(pool) for pool in pools]  # or the provider would keep them alive

    def observed(figures):
        def callback(options):
            for reference in watched:
                pool = reference()
                if pool is not None:
                    for value, facts in figures(pool):
                        yield metrics.Observation(value, {"pool": pool.config.name, **facts})

        return [callback]

    def count(pool):
        stats = pool.stats()
        return [(getattr(stats, state), {"state": state}) for state in STATES]

    up_down = meter.create_observable_up_down_counter
    for name, figures, unit, about in (
        ("count", count, "{worker}", "Workers by state"),
        ("max", lambda p: [(p.config.max_size + p.config.max_overflow, {})], "{worker}",
         "The most workers the pool may have"),
        ("idle.min", lambda p: [(p.config.min_size, {})], "{worker}",
         "The least workers the pool keeps"),
        ("pending_requests", lambda p: [(p.stats().waiting, {})], "{request}",
         "Callers waiting for a worker"),
    ):  # fmt: skip
        up_down(f"minipool.worker.{name}", observed(figures), unit, about)
    meter.create_observable_counter(
        "minipool.worker.timeouts", observed(lambda p: [(p.stats().checkout_timeouts, {})]),
        "{timeout}", "Callers that waited in vain",
    )  # fmt: skip
    histograms = {
        event: meter.create_histogram(f"minipool.worker.{name}", "s", about)
        for event, (_, name, about) in TIMES.items()
    }

    def hear(event, measurements, metadata):
        histograms[event].record(measurements[TIMES[event][0]], {"pool": metadata["pool"]})

    detachers = [telemetry.attach_reporter(pool, hear, TIMES) for pool in pools]

    def detach():
        watched.clear()
        for each in detachers:
            each()

    return detach


def main():
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    pool = Pool(size=2, name="demo")
    instrument(pool, meter=provider.get_meter("minipool"))
    with pool:
        for number in range(3):
            pool.call(abs, -number)
        data = reader.get_metrics_data()
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            value = point.value if hasattr(point, "value") else f"{point.count} times"
            print(f"{metric.name} {dict(point.attributes)} {value}")
    provider.shutdown()


if __name__ == "__main__":
    main()
