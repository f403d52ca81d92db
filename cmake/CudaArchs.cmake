# scattermoe_cuda_archs(<out-generic> <out-sm90a> <out-text> <list>)
#
# Turns a list in the form of TORCH_CUDA_ARCH_LIST ("8.0 9.0a 12.0+PTX", separated by spaces or semicolons) into nvcc flags:
#   <out-generic>  for the files that run on every chip of the list
#   <out-sm90a>    for csrc/kernels/sm90: wgmma and setmaxnreg exist for compute_90a alone; empty without 9.0 in the list
#   <out-text>     the architectures that are really compiled, to be shown to the user
# An empty list means every architecture below that the toolkit knows, and PTX of the newest for chips still to come.
function(scattermoe_cuda_archs out_generic out_sm90a out_text arch_list)
    execute_process(
        COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch
        OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY
    )
    string(REGEX MATCHALL "[0-9]+" known "${known}")

    if(arch_list STREQUAL "")
        foreach(arch 80 86 89 90 100 120)
            if(arch IN_LIST known)
                list(APPEND real ${arch})
                set(ptx ${arch})
            endif()
        endforeach()
    else()
        string(REGEX REPLACE "[ ,;]+" ";" items "${arch_list}")
        foreach(item IN LISTS items)
            if(NOT item MATCHES "^([0-9]+)\\.([0-9])[af]?(\\+PTX)?$")
                message(FATAL_ERROR "scattermoe: TORCH_CUDA_ARCH_LIST has '${item}'; expected entries such as 8.0, 9.0a or 12.0+PTX")
            endif()
            set(arch "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
            if(NOT arch IN_LIST known OR arch LESS 80)
                message(FATAL_ERROR "scattermoe: architecture '${item}' of TORCH_CUDA_ARCH_LIST is not one that both nvcc ${CMAKE_CUDA_COMPILER_VERSION} and this library (8.0 and newer) know")
            endif()
            list(APPEND real ${arch})
            if(item MATCHES "PTX$")
                list(APPEND ptx ${arch})
            endif()
        endforeach()
    endif()

    list(REMOVE_DUPLICATES real)
    foreach(arch IN LISTS real)
        list(APPEND generic "--generate-code=arch=compute_${arch},code=[sm_${arch}]")
        list(APPEND text "sm_${arch}")
        if(arch EQUAL 90 AND SCATTERMOE_KERNELS_SM90)
            set(sm90a "--generate-code=arch=compute_90a,code=[sm_90a]")
            list(APPEND text "sm_90a")
        endif()
    endforeach()
    foreach(arch IN LISTS ptx)
        list(APPEND generic "--generate-code=arch=compute_${arch},code=[compute_${arch}]")
        list(APPEND text "compute_${arch}")
    endforeach()

    set(${out_generic} "${generic}" PARENT_SCOPE)
    set(${out_sm90a} "${sm90a}" PARENT_SCOPE)
    string(REPLACE ";" " " text "${text}")
    set(${out_text} "${text}" PARENT_SCOPE)
endfunction()
