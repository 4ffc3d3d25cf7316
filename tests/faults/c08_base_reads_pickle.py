"""Fault (security): a base whose unet/diffusion_pytorch_model.safetensors.index.json names a shard `evil.bin` is read by torch.load (restricted
unpickler), by read_unet and by FunLoraPipeline.from_pretrained, although README says that only JSON and safetensors are read. exit 1 = present."""
import sys, json, tempfile, torch
from pathlib import Path
from diffusers import UNet2DModel, FlowMatchEulerDiscreteScheduler
from funlora_hf import FunLoraPipeline
from funlora_hf.adapters.untrusted_base import read_unet
d=Path(tempfile.mkdtemp())/"base"
unet=UNet2DModel(sample_size=8,in_channels=1,out_channels=1,block_out_channels=(32,64),layers_per_block=1,down_block_types=("DownBlock2D",)*2,up_block_types=("UpBlock2D",)*2,num_class_embeds=2)
FunLoraPipeline(unet,FlowMatchEulerDiscreteScheduler(),[0,1],{0:"0",1:"1"}).save_pretrained(d)
(d/"unet"/"diffusion_pytorch_model.safetensors").unlink(); sd=unet.state_dict(); torch.save(sd,d/"unet"/"evil.bin")
(d/"unet"/"diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata":{"total_size":1},"weight_map":dict.fromkeys(sd,"evil.bin")}))
seen=[]; load=torch.load
def spy(*a,**k): seen.append((str(a[0]),k.get("weights_only"))); return load(*a,**k)
torch.load=spy
for name,f in (("read_unet",read_unet),("FunLoraPipeline.from_pretrained",FunLoraPipeline.from_pretrained)):
    try: f(d); print(name,"loaded it")
    except Exception as e: print(name,"refused:",type(e).__name__,str(e)[:150])
print("unpickled:",seen); sys.exit(1 if seen else 0)
