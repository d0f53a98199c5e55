from fedelta.engines.flower.deployment import run_on_loopback
from fedelta.runner import run, open_run
import time
def test_loop(tiny_config, tmp_path):
    c=dict(method="fedex",rounds=3,partition={"kind":"iid","clients":3})
    local=run(tiny_config(name="local",**c))
    cfg=tiny_config(name="flower",**c)
    b=time.time()
    try:
        run_on_loopback(cfg,sorted(local.result["clients"]),False,120)
    finally:
        for f in sorted((cfg.folder/"logs").iterdir()): print("=====",f.name); print(f.read_text()[-2500:])
    print("TOOK",time.time()-b)
    f=open_run(cfg.folder)
    print(f.records==local.records)
    assert f.folder.rounds_file.read_bytes()==local.folder.rounds_file.read_bytes()
