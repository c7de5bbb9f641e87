"""The decoding itself: pure logic over tokens and tensors, without threads, devices or input and output."""
