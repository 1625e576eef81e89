import sys, time, torch, torch.distributed as dist
from dataclasses import replace
from llama.config import ModelConfig, MoEConfig
from llama.training.config import *
from llama.training import trainer as TM
from llama.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.llama.training.helpers import Samples
MC=ModelConfig(vocab_size=4096,dim=256,num_layers=5,num_heads=8,num_kv_heads=4,max_seq_len=256,moe=MoEConfig(num_experts=4,top_k=2,num_shared_experts=1))
def cfg(**k): return TrainConfig(**({"steps":8,"global_batch":16,"micro_batch":8,"seq_len":256,"parallel":ParallelConfig(ep=2),"log_every":100}|k))
def body(rank, world, precision, profile):
    c=cfg(precision=precision); t=Trainer(MC,c,Samples(c,4096,rank,world)); times=[]
    orig=t._step
    prof=torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profile and rank==0 else None
    n=[0]
    def step(b):
        n[0]+=1
        if prof and n[0]==5: prof.__enter__()
        s=time.perf_counter(); r=orig(b); times.append(time.perf_counter()-s)
        if prof and n[0]==6: prof.__exit__(None,None,None)
        return r
    t._step=step; t.fit()
    if prof: print(prof.key_averages().table(sort_by="self_cpu_time_total",row_limit=26,max_name_column_width=58))
    return times
if __name__=="__main__":
    print("params",MC.num_parameters()/1e6,"active",MC.num_active_parameters()/1e6, "expert hidden", MC.moe.expert_hidden_dim)
    run_ranks(body,2,"fp32",True)
    for _ in range(2):
        for p in ("fp32","bf16"):
            ts=sorted(run_ranks(body,2,p,False)[0][2:]); print(p,"median step %.3f min %.3f -> %.0f tok/s (median)"%(ts[len(ts)//2],ts[0],4096/ts[len(ts)//2]))
