"""What every service stands on. Knows no service, no model, no index.

A service derives its settings (settings.py: HttpSettings, or GrpcSettings when it has rpcs), writes a core (service.py:
Core), routers and servicers that call it, and describes the whole as one `Service`. `lifecycle.main(service)` after
`settings.load_settings` is then its `__main__`, and `async with lifecycle.running(service)` runs it inside a test.
Handlers raise knnlm.errors and read `calls.current()` for the id, the time left and a place for stage timings; admin
routes take `dependencies=[Depends(auth.admin_only)]`, admin rpcs `await auth.admin_only()`. Blocking work goes through
a `batching.Batcher` or asyncio.to_thread, never onto the loop.
"""
