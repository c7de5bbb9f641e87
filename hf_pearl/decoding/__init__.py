"""The decoding itself: logic over tokens and tensors, without threads, processes or caches of its own.

Of devices it knows where tensors lie; on CUDA it has a kernel for the noise.
"""
