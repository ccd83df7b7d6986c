version: str
compiler: str
cpu_levels: str
cuda_version: str
cuda_archs: str

def cpu_capability() -> str: ...
def missing_cuda_code(archs: str, capability: int) -> str: ...
