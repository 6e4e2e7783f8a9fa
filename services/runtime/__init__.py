"""What every service shares. It knows no service, no model, no index.

A service derives its settings (settings.py: HttpSettings, or GrpcSettings when it has rpcs), writes a core (service.py:
Core), routers and servicers that call it, and describes the whole as one `Service`. `lifecycle.main(service)` after
`settings.load_settings` is then its `__main__`, and `async with lifecycle.running(service)` runs it inside a test.
Handlers raise knnlm.errors and read `context.current()` for the id, the time left and the timings of stages; admin
routes take `dependencies=[Depends(security.admin_only)]`, admin rpcs `await security.admin_only()`. An rpc that answers
with a stream is an async generator. Blocking work goes through a `batching.Batcher` or asyncio.to_thread, never onto
the loop.
"""
