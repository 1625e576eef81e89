import time, statistics as st
from llama.training.trainer import Trainer
from llama.training.precision import fast_cpu_matmul
from tests.distributed import run_ranks
from tests.llama.training.helpers import Samples
from tests.scratch_prof import cfg, MC
def body(rank, world, precision, rounds):
    def make(block):
        c=cfg(precision=precision); t=Trainer(MC,c,Samples(c,4096,rank,world)); t._set_up()
        if not block: t._attend=None
        it=iter(t.loader); return lambda: t._step([next(it) for _ in range(t._accumulation)])
    fs={"sdpa":make(False),"block":make(True)}; rows=[]
    with fast_cpu_matmul() as fast:
        for i in range(rounds):
            r={}
            for k in (("sdpa","block") if i%2 else ("block","sdpa")):
                w,c=time.perf_counter(),time.process_time(); fs[k](); r[k]=(time.perf_counter()-w,time.process_time()-c)
            if i>=2: rows.append((r["block"][0]/r["sdpa"][0],r["block"][1]/r["sdpa"][1],r["block"][0]))
    return rows, fast
if __name__=="__main__":
    for p in ("fp32","bf16"):
        rows,fast=run_ranks(body,2,p,16,timeout_s=200)[0]
        q=lambda i:(lambda x:"%.2f (%.2f-%.2f)"%(st.median(x),x[len(x)//4],x[3*len(x)//4]))(sorted(r[i] for r in rows))
        print(p,"block/sdpa wall",q(0),"cpu",q(1),"block step s",q(2),"tok/s at median %.0f"%(4096/st.median([r[2] for r in rows])),"oneDNN accepted",fast,flush=True)
