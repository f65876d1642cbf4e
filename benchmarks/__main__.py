"""``make bench``: each figure is a ratio of two things measured in turns, the best of each."""

from benchmarks import cloning, highstate

if __name__ == "__main__":
    highstate.main()
    cloning.main()
