"""DeepSpeed ranks: the student with its loss, optimiser steps, what is published, saved and restored."""
