from hypothesis import settings

# No deadline: the time that a test takes is the machine's, not the code's.
settings.register_profile("tensors", deadline=None, max_examples=50)
settings.load_profile("tensors")
