#!/usr/bin/env bash
# Installs what benchmarks/gpu.py measures beside this library, in the versions of docs/benchmarks.md, into folders of their own:
#
#     benchmarks/install_peers.sh [FOLDER]        # default: packages, with sonicmoe, megablocks and scattermoe-triton in it
#     python benchmarks/gpu.py --peer-path packages/*
#
# PYTHON=python3: whose PyTorch they are for. MegaBlocks and its grouped_gemm are compiled, for TORCH_CUDA_ARCH_LIST (9.0), which
# takes nvcc and some minutes; no GPU is needed.
set -euo pipefail
folder=$(realpath -m "${1:-packages}")
python=${PYTHON:-python3}
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
mkdir -p "$folder"

# Exact versions of everything, or pip would bring a PyTorch along.
install() { "$python" -m pip install --quiet --no-deps --upgrade --target "$folder/$1" "${@:2}"; }

echo "SonicMoE and Liger-Kernel"
install sonicmoe sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl==4.4.2 nvidia-cutlass-dsl-libs-base==4.4.2 \
    apache-tvm-ffi==0.1.9 torch-c-dlpack-ext==0.1.5 cuda-python==13.0.3 cuda-bindings==13.0.3 cuda-pathfinder==1.9.1 einops==0.8.2 \
    liger-kernel==0.8.5

echo "ScatterMoE"
git clone --quiet https://github.com/shawntan/scattermoe "$sources/scattermoe"
git -C "$sources/scattermoe" checkout --quiet 47b5e15
rm -rf "$folder/scattermoe-triton"
mkdir "$folder/scattermoe-triton"
cp -r "$sources/scattermoe/scattermoe" "$folder/scattermoe-triton/"

echo "MegaBlocks"
"$python" -m pip install --quiet --target "$sources/tools" "setuptools<81" wheel ninja
export PYTHONPATH=$sources/tools PATH=$sources/tools/bin:$PATH
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} GROUPED_GEMM_CUTLASS=0
for package in grouped_gemm==0.3.0 stanford-stk==0.7.1 megablocks==0.10.0; do
    "$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$sources" "$package"
done
for archive in "$sources"/*.tar.gz; do
    tar -xf "$archive" -C "$sources"
done
cd "$sources"
# CUB's functions have lost an argument.
sed -i -z 's/stream,\s*debug_synchronous));/stream));/g' megablocks-0.10.0/csrc/*.h
# Newer Triton multiplies the 16-bit indices of blocks in 16 bits. With that mended MegaBlocks need not refuse it.
sed -i -E 's/tl\.load\((row_indices \+ pid|column_indices \+ pid|column_indices \+ start_inx \+ block_inx)\)/&.to(tl.int32)/' \
    stanford_stk-0.7.1/stk/backend/triton_kernels.py
sed -i "s/if triton.__version__ >= '3.2.0':/if False:/" megablocks-0.10.0/megablocks/layers/arguments.py
install megablocks --no-build-isolation ./grouped_gemm-0.3.0 ./stanford_stk-0.7.1 ./megablocks-0.10.0

du -sh "$folder"/*
