# Defines the imported target scattermoe::torch from an installed PyTorch, without its own CMake package: that one refuses to
# load a CUDA build of PyTorch on a machine that has no CUDA toolkit, where a CPU build of this library is still wanted.
#
# In:  SCATTERMOE_TORCH_DIR (the folder of the Python package `torch`, or an unpacked libtorch), or else Python's own torch.
# Out: SCATTERMOE_TORCH_DIR, SCATTERMOE_TORCH_VERSION ("2.11.0+cu130"), SCATTERMOE_TORCH_CUDA ("13.0", or empty: a CPU build),
#      targets scattermoe::torch and, for a CUDA build of PyTorch, scattermoe::torch_cuda.

if(NOT SCATTERMOE_TORCH_DIR)
    if(NOT Python_EXECUTABLE)
        find_package(Python 3.10 COMPONENTS Interpreter QUIET)
    endif()
    if(Python_EXECUTABLE)
        execute_process(
            COMMAND "${Python_EXECUTABLE}" -c
                    "from importlib.util import find_spec as f; s = f('torch'); print(s.submodule_search_locations[0] if s else '', end='')"
            OUTPUT_VARIABLE _torch_dir
        )
        set(SCATTERMOE_TORCH_DIR "${_torch_dir}" CACHE PATH "The folder of the installed PyTorch" FORCE)
    endif()
endif()
if(NOT EXISTS "${SCATTERMOE_TORCH_DIR}/include/torch/library.h")
    message(
        FATAL_ERROR
        "scattermoe needs PyTorch 2.9 or newer: run `pip install torch`, or name its folder with -DSCATTERMOE_TORCH_DIR=..."
    )
endif()

# The Python package says its version in version.py, the C++ archive in build-version.
set(SCATTERMOE_TORCH_CUDA "")
if(EXISTS "${SCATTERMOE_TORCH_DIR}/version.py")
    file(STRINGS "${SCATTERMOE_TORCH_DIR}/version.py" _lines REGEX "^(__version__|cuda)")
    foreach(_line IN LISTS _lines)
        if(_line MATCHES "^__version__[^=]*= *'([^']+)'")
            set(SCATTERMOE_TORCH_VERSION "${CMAKE_MATCH_1}")
        elseif(_line MATCHES "^cuda[^=]*= *'([^']+)'")
            set(SCATTERMOE_TORCH_CUDA "${CMAKE_MATCH_1}")
        endif()
    endforeach()
elseif(EXISTS "${SCATTERMOE_TORCH_DIR}/build-version")
    file(STRINGS "${SCATTERMOE_TORCH_DIR}/build-version" SCATTERMOE_TORCH_VERSION LIMIT_COUNT 1)
    if(SCATTERMOE_TORCH_VERSION MATCHES "\\+cu([0-9]+)([0-9])$")
        set(SCATTERMOE_TORCH_CUDA "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    endif()
endif()
if(NOT SCATTERMOE_TORCH_VERSION MATCHES "^[0-9]+\\.[0-9]+" OR SCATTERMOE_TORCH_VERSION VERSION_LESS 2.9)
    message(
        FATAL_ERROR
        "scattermoe needs PyTorch 2.9 or newer, found '${SCATTERMOE_TORCH_VERSION}' in ${SCATTERMOE_TORCH_DIR}: run `pip install -U torch`"
    )
endif()

if(NOT TARGET scattermoe::torch)
    set(_lib "${SCATTERMOE_TORCH_DIR}/lib")
    add_library(scattermoe::torch INTERFACE IMPORTED)
    target_include_directories(
        scattermoe::torch SYSTEM
        INTERFACE "${SCATTERMOE_TORCH_DIR}/include" "${SCATTERMOE_TORCH_DIR}/include/torch/csrc/api/include"
    )
    # PyTorch 2.9 and newer are only built with the C++11 ABI of libstdc++.
    target_compile_definitions(scattermoe::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
    target_compile_features(scattermoe::torch INTERFACE cxx_std_20)
    foreach(_name torch torch_cpu c10)
        add_library(scattermoe::lib${_name} SHARED IMPORTED)
        set_target_properties(scattermoe::lib${_name} PROPERTIES IMPORTED_LOCATION "${_lib}/lib${_name}.so")
        target_link_libraries(scattermoe::torch INTERFACE scattermoe::lib${_name})
    endforeach()
    if(SCATTERMOE_TORCH_CUDA AND EXISTS "${_lib}/libtorch_cuda.so")
        add_library(scattermoe::torch_cuda INTERFACE IMPORTED)
        foreach(_name torch_cuda c10_cuda)
            add_library(scattermoe::lib${_name} SHARED IMPORTED)
            set_target_properties(scattermoe::lib${_name} PROPERTIES IMPORTED_LOCATION "${_lib}/lib${_name}.so")
            target_link_libraries(scattermoe::torch_cuda INTERFACE scattermoe::lib${_name})
        endforeach()
    endif()
    # torch_cpu's own dependencies (CUDA's libraries among them) are found by the loader through PyTorch's RPATH; the linker
    # has no reason to look for them.
    target_link_options(scattermoe::torch INTERFACE "LINKER:--allow-shlib-undefined")
endif()
