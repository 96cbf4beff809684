import torch
def per_row(t,x): return t.reshape(-1,*[1]*(x.ndim-1))
def interpolate(data,noise,t):
    t=per_row(t,data); return (1-t)*data+t*noise
def velocity(data,noise): return noise-data
def shift_time(t,shift): return shift*t/(1+(shift-1)*t)
def time_grid(steps,shift=1.0): return shift_time(1-torch.arange(steps+1)/steps,shift)
@torch.no_grad()
def sample(field,noise,times,cond=None,solver="euler",trajectory=False):
    x=noise
    for t,s in zip(times[:-1],times[1:]): x=x-(t-s)*field(x,t.to(x.device).expand(len(x)),cond)
    return x
