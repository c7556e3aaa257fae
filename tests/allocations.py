"""What a function allocates on the CPU."""

from torch.profiler import ProfilerActivity, profile


def allocations(function, warm=True):
    """Sizes in bytes, in order, of what the CPU allocator gives (+) and takes back (-) while the function runs."""
    if warm:
        function()  # lazily made buffers are not the step's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def peak(sizes):
    now = highest = 0
    for size in sizes:
        now += size
        highest = max(highest, now)
    return highest
