# Decides whether CUDA is built, and enables the language if it is.
#
# In:  SCATTERMOE_CUDA (AUTO, ON, OFF), TORCH_CUDA_ARCH_LIST (variable or environment).
# Out: SCATTERMOE_CUDA_ENABLED, SCATTERMOE_CUDA_ARCHS (text), SCATTERMOE_GENCODE, SCATTERMOE_GENCODE_SM90A (nvcc flags).

set(SCATTERMOE_CUDA_ENABLED OFF)
set(SCATTERMOE_CUDA_ARCHS "")
set(_why_not "")

if(NOT SCATTERMOE_CUDA STREQUAL "AUTO" AND NOT SCATTERMOE_CUDA)
    set(_why_not "SCATTERMOE_CUDA is off")
elseif(NOT TARGET scattermoe::torch_cuda)
    set(_why_not "PyTorch ${SCATTERMOE_TORCH_VERSION} is built without CUDA")
else()
    find_program(
        SCATTERMOE_NVCC nvcc
        HINTS "$ENV{CUDACXX}" ENV CUDA_HOME ENV CUDA_PATH
        PATHS /usr/local/cuda
        PATH_SUFFIXES bin
    )
    if(CMAKE_CUDA_COMPILER OR DEFINED ENV{CUDACXX} OR SCATTERMOE_NVCC)
        set(SCATTERMOE_CUDA_ENABLED ON)
    else()
        set(_why_not "there is no CUDA compiler (nvcc) on PATH or in CUDA_HOME")
    endif()
endif()

if(SCATTERMOE_CUDA_ENABLED)
    if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
        set(CMAKE_CUDA_COMPILER "${SCATTERMOE_NVCC}")
    endif()
    if(NOT DEFINED CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
        set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
    endif()
    # The architectures are flags of each source file: those of csrc/kernels/sm90 are not those of the others.
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    # The runtime is linked in: PyTorch keeps its own copy where only PyTorch finds it, and both share a device's context.
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    # CMake before 3.26 does not know that nvcc has C++20.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
        set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
        set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    endif()
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    find_package(CUDAToolkit REQUIRED)

    string(REGEX MATCH "^[0-9]+" _torch_cuda_major "${SCATTERMOE_TORCH_CUDA}")
    if(NOT CUDAToolkit_VERSION_MAJOR EQUAL _torch_cuda_major)
        message(
            FATAL_ERROR
            "scattermoe: nvcc is of CUDA ${CUDAToolkit_VERSION} but PyTorch ${SCATTERMOE_TORCH_VERSION} is built for CUDA ${SCATTERMOE_TORCH_CUDA}: install a toolkit of the same major version, or set SCATTERMOE_CUDA=0 to build for the CPU only"
        )
    endif()

    include(CudaArchs)
    if(NOT DEFINED TORCH_CUDA_ARCH_LIST)
        set(TORCH_CUDA_ARCH_LIST "$ENV{TORCH_CUDA_ARCH_LIST}")
    endif()
    scattermoe_cuda_archs(SCATTERMOE_GENCODE SCATTERMOE_GENCODE_SM90A SCATTERMOE_CUDA_ARCHS "${TORCH_CUDA_ARCH_LIST}")
    message(NOTICE "scattermoe: building for CUDA ${CUDAToolkit_VERSION} (${SCATTERMOE_CUDA_ARCHS}) and the CPU, PyTorch ${SCATTERMOE_TORCH_VERSION}")
elseif(NOT SCATTERMOE_CUDA STREQUAL "AUTO" AND SCATTERMOE_CUDA)
    message(FATAL_ERROR "scattermoe: a CUDA build was asked for (SCATTERMOE_CUDA=1), but ${_why_not}")
else()
    message(NOTICE "scattermoe: building for the CPU only (${_why_not}), PyTorch ${SCATTERMOE_TORCH_VERSION}")
endif()
