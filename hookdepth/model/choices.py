"""What `load` lets one choose, in words, and what people call it elsewhere. Nothing here needs torch."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "8bit", "4bit")
KERNELS = ("plain", "fused")
ALSO_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
ALSO_BITS = {"8": "8bit", "int8": "8bit", "4": "4bit", "int4": "4bit", "nf4": "4bit", "fp4": "4bit", "no": "none"}
