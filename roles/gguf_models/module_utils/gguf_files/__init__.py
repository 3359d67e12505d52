"""Model files of one host: what is there, what is missing, and how the missing part gets there.

Standard library only: the package travels to the host twice, inside the Ansible module (which looks) and as a
zip application (which downloads, as the files' owner, in the transient unit gguf-fetch).
"""
