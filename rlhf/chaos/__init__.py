"""Faults on purpose: killed, stopped and slowed processes, lost messages, a full disk, a changed byte."""
