import torch
def endpoint_distance(a,b): return (a-b).square().mean().sqrt().item()
def frechet_distance(a,b):
    a,b=a.double(),b.double(); ma,mb=a.mean(0),b.mean(0); A,B=torch.cov(a.T),torch.cov(b.T)
    l,v=torch.linalg.eigh(A); h=v@torch.diag(l.clamp(min=0).sqrt())@v.T
    return ((ma-mb).square().sum()+A.trace()+B.trace()-2*torch.linalg.eigvalsh(h@B@h).clamp(min=0).sqrt().sum()).item()
